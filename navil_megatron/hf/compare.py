"""Whether two models are the same: what their configs compute, and every bit of every tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from navil_megatron.config.load import config_to_dict
from navil_megatron.config.model import ModelConfig
from navil_megatron.files.worker_pool import Meter, OnProgress
from navil_megatron.hf.convert import ahead
from navil_megatron.hf.model_source import ModelSource, open_source
from navil_megatron.hf.verify import same_bits, size_of, type_name

SHOWN = 10
"""Differences that are listed one by one."""
_ONLY_AT_THE_START = ("init_std", "layer_scale_init", "visual_expert_init")
"""Settings that say how weights start, not what the model computes."""


@dataclass
class _Found:
    """What a comparison has found so far."""

    num_equal: int = 0
    num_equal_after_cast: int = 0
    num_different: int = 0
    casts: set[str] = field(default_factory=set)
    first: list[dict[str, Any]] = field(default_factory=list)

    def differ(self, key: str, what: str, distance: float | None = None) -> None:
        self.num_different += 1
        if len(self.first) < SHOWN:
            self.first.append({"key": key, "what": what, "max_abs_difference": distance})


def compare(one: Path, other: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Compares two models, each a checkpoint or a folder, tensor by tensor.

    Args:
        one: First model.
        other: Second model.
        on_progress: Is told the bytes that were read of both.

    Returns:
        What was found, ready for JSON; ``equal`` says whether there is any difference.

    Raises:
        UserError: One of them is incomplete or damaged.
    """
    sources = (open_source(one), open_source(other))
    first, second = (source.signatures for source in sources)
    settings = _config_differences(sources[0].model, sources[1].model)
    shared = [key for key in first if key in second]
    meter = Meter(sum(size_of(headers[key])[1] for headers in (first, second) for key in shared), on_progress)
    found = _Found()
    for (key, mine), theirs in zip(_tensors(sources[0], shared), _tensors(sources[1], shared), strict=True):
        _compare_tensor(key, mine, theirs[1], found)
        meter.add(mine.nbytes + theirs[1].nbytes)
    missing = [sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys())]
    return {
        "first": _named(sources[0]),
        "second": _named(sources[1]),
        "equal": not (settings or missing[0] or missing[1] or found.num_different or found.num_equal_after_cast),
        "config_differences": settings,
        "num_equal": found.num_equal,
        "num_equal_after_cast": found.num_equal_after_cast,
        "equal_after_casting_to": sorted(found.casts),
        "num_different": found.num_different,
        "only_in_first": missing[0],
        "only_in_second": missing[1],
        "differences": found.first,
    }


def describe_comparison(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    lines = [f"{report[side]['path']} ({report[side]['kind']})" for side in ("first", "second")]
    only = {side: report[f"only_in_{side}"] for side in ("first", "second")}
    lines.append(
        f"{report['num_equal']} tensors equal, {report['num_different']} different, "
        f"{len(only['first'])} only in the first, {len(only['second'])} only in the second"
    )
    if report["num_equal_after_cast"]:
        names = " or ".join(report["equal_after_casting_to"])
        lines.append(f"{report['num_equal_after_cast']} tensors of another type, equal after casting to {names}")
    lines += [f"config: {line}" for line in report["config_differences"]]
    for entry in report["differences"]:
        distance = entry["max_abs_difference"]
        lines.append(f"{entry['key']}: {entry['what']}" + ("" if distance is None else f" by at most {distance:.3g}"))
    for side, keys in only.items():
        lines += [f"{key}: only in the {side}" for key in keys[:SHOWN]]
    lines.append("equal" if report["equal"] else "not equal")
    return "\n".join(lines)


def _tensors(source: ModelSource, keys: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in the order of the keys; what is made of the same source is read once."""
    together = (list(group) for _, group in groupby(keys, lambda key: id(source.jobs[key]) if source.jobs else key))
    for group, tensors in ahead(together, lambda group: source.read(group[0])):
        for key in group:
            shape, _ = source.signatures[key]
            if tensors[key].shape != shape:
                raise RuntimeError(f"{key} is {list(tensors[key].shape)}, its header says {list(shape)}")
            yield key, tensors[key]


def _compare_tensor(key: str, mine: torch.Tensor, theirs: torch.Tensor, found: _Found) -> None:
    if mine.shape != theirs.shape:
        found.differ(key, f"{list(mine.shape)} and {list(theirs.shape)}")
    elif same_bits(mine, theirs):
        found.num_equal += 1
    elif mine.dtype == theirs.dtype:
        found.differ(key, "differs", _distance(mine, theirs))
    else:
        narrow = min(mine.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
        types = f"{type_name(mine.dtype)} and {type_name(theirs.dtype)}"
        if same_bits(mine.to(narrow), theirs.to(narrow)):
            found.num_equal_after_cast += 1
            found.casts.add(type_name(narrow))
        else:
            found.differ(key, f"{types}, and differs", _distance(mine, theirs))


def _distance(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference; in blocks, so that a table of embeddings is not held in double precision."""
    blocks = zip(mine.reshape(-1).split(1 << 24), theirs.reshape(-1).split(1 << 24), strict=True)
    return max((float((one.double() - other.double()).abs().max()) for one, other in blocks), default=0.0)


def _config_differences(one: ModelConfig | None, other: ModelConfig | None) -> list[str]:
    if one is None or other is None:
        return []
    mine, theirs = dict(_flat(config_to_dict(one), "model")), dict(_flat(config_to_dict(other), "model"))
    return [
        f"{name} is {mine.get(name)!r} and {theirs.get(name)!r}"
        for name in mine
        if mine[name] != theirs.get(name) and name.rpartition(".")[2] not in _ONLY_AT_THE_START
    ]


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value


def _named(source: ModelSource) -> dict[str, str]:
    return {"kind": source.kind, "path": str(source.path)}
