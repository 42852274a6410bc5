"""What a source of samples is called in records: the stem of its index, and no more than is needed to tell it apart."""

from collections.abc import Sequence
from pathlib import PurePath


def source_names(indexes: Sequence[str]) -> list[str]:
    """A name for each index file, in order.

    The stem. Where others have the same one, folders go before it until it differs (``a/train``, ``b/train``); what no
    folder tells apart, as an index that is listed twice, is numbered (``train``, ``train_2``).
    """
    paths = [PurePath(index) for index in indexes]
    names: list[str] = []
    for path in paths:
        others = [other for other in paths if other != path]
        depths = range(1, len(path.parts) + 1)
        unlike = (depth for depth in depths if _name(path, depth) not in {_name(other, depth) for other in others})
        names.append(_name(path, next(unlike, 1)))
    numbers = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [name if number == 1 else f"{name}_{number}" for name, number in zip(names, numbers, strict=True)]


def _name(path: PurePath, num_parts: int) -> str:
    return "/".join([*path.parent.parts, path.stem][-num_parts:])
