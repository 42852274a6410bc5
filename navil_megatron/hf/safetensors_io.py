"""Folders of safetensors parts, read lazily as a mapping and written part by part.

Only headers are read to know what a folder holds; a tensor is read when it is asked for.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from navil_megatron.config.errors import UserError
from navil_megatron.hf.param_map import Shape
from navil_megatron.hf.verify import Signature

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFolder(Mapping[str, torch.Tensor]):
    """The tensors of a folder's safetensors parts, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers of all parts.

        Raises:
            UserError: A part is missing or damaged, or a key lies in two parts.
        """
        self._parts = {}
        self._part_of_key: dict[str, Path] = {}
        for path in _parts(folder):
            try:
                self._parts[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read as safetensors ({error}): download or copy it again") from None
            for key in self._parts[path].keys():  # noqa: SIM118  (not a mapping)
                if key in self._part_of_key:
                    raise UserError(f"{key} lies in {self._part_of_key[key].name} and in {path.name}: keep one of them")
                self._part_of_key[key] = path

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._parts[self._part_of_key[key]].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._part_of_key)

    def __len__(self) -> int:
        return len(self._part_of_key)

    def signatures(self) -> dict[str, Signature]:
        """Shape and type of every tensor, from the headers."""
        found = {}
        for key, path in self._part_of_key.items():
            header = self._parts[path].get_slice(key)
            # A type that is not listed is no weight either; any type outside WEIGHT_TYPES is refused later.
            found[key] = (tuple(header.get_shape()), _TYPES.get(header.get_dtype(), torch.uint8))
        return found


def plan_parts(sizes: Mapping[str, int], max_part_bytes: int) -> list[list[str]]:
    """Keys in order, cut into parts of at most so many bytes; a larger tensor gets a part of its own."""
    parts: list[list[str]] = []
    filled = 0
    for key, size in sizes.items():
        if not parts or filled + size > max_part_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(key)
        filled += size
    return parts


def write_parts(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    shapes: Mapping[str, tuple[Shape, int]],
    max_part_bytes: int,
) -> list[str]:
    """Writes tensors as safetensors parts, with an index if there are several; gives the file names.

    Args:
        folder: Where to.
        tensors: Key and tensor, in the order of ``shapes``; each is let go once its part is on disk.
        shapes: Shape and bytes per number of every key, known beforehand so that parts can be named.
        max_part_bytes: Largest part.
    """
    sizes = {key: torch.Size(shape).numel() * width for key, (shape, width) in shapes.items()}
    parts = plan_parts(sizes, max_part_bytes)
    names = [SINGLE_FILE]
    if len(parts) > 1:
        names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    stream = iter(tensors)
    for name, keys in zip(names, parts, strict=True):
        # Layers are views of one stacked tensor; safetensors wants memory that no other tensor shares.
        part = {key: tensor.contiguous().clone() for key, tensor in (next(stream) for _ in keys)}
        if list(part) != keys:
            raise RuntimeError(f"tensors do not arrive in the planned order in {name}")
        save_file(part, folder / name, metadata={"format": "pt"})
    if len(parts) > 1:
        weight_map = {key: name for name, keys in zip(names, parts, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        names.append(INDEX_FILE)
    return names


def _parts(folder: Path) -> list[Path]:
    """The folder's parts, as its index lists them, or its only file."""
    index = folder / INDEX_FILE
    if not index.is_file():
        single = folder / SINGLE_FILE
        if not single.is_file():
            raise UserError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: expected a folder with safetensors")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index} is not a safetensors index: expected JSON with a weight_map") from None
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(f"{index} names {outside[0]!r}, expected file names inside the folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which its index names: download or copy them")
    return [folder / name for name in names]
