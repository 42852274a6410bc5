"""What a checkpoint folder holds and where, by its ``.metadata`` alone: nothing in it is imported, called or built.

megatron-core's ``torch_dist`` format is PyTorch's distributed checkpoint: ``.metadata`` is a pickle that gives, for
every tensor, its size, type and chunks, and for every chunk a file, an offset and a length.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from navil_megatron.blueprint.parameters import Shape
from navil_megatron.config.errors import UserError
from navil_megatron.hf.checkpoint.inert_pickle import Name, Record, read_pickle

METADATA_FILE = ".metadata"
OPTIMIZER_PREFIX = "optimizer."
"""Keys of tensors that are optimizer state."""
_METADATA = "torch.distributed.checkpoint.metadata"
_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128")
_TYPES = (*_FLOATS, "int64", "int32", "int16", "int8", "uint8", "bool")
ALLOWED = frozenset(
    {
        *(f"torch.{name}" for name in _TYPES),
        "torch.Size",
        "torch.serialization._get_layout",
        "collections.OrderedDict",
        # Where it was saved.
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        *(
            f"{_METADATA}.{name}"
            for name in (
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorStorageMetadata",
                "TensorProperties",
                "ChunkStorageMetadata",
                "BytesStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        # Core leaves every rank's plan in the metadata, to save the next checkpoint faster.
        *(
            f"torch.distributed.checkpoint.planner.{name}"
            for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
        ),
    }
)
"""Every name that a checkpoint's metadata may hold."""
_MAX_CELLS = 20_000_000


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and the bytes of a file that hold it."""

    offsets: Shape
    sizes: Shape
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    shape: Shape
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


def read_metadata(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor that is not optimizer state; chunks fill each one exactly, and their bytes lie in existing files.

    Raises:
        UserError: The folder is not a complete checkpoint, or its metadata is damaged or names what it may not.
    """
    path = folder / METADATA_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {METADATA_FILE}: its save was cut short; use an older checkpoint")
    try:
        tensors = dict(_tensors(read_pickle(path.read_bytes(), ALLOWED)))
        for key, tensor in tensors.items():
            _require_cover(key, tensor)
    except ValueError as error:
        raise UserError(f"checkpoint {folder} is damaged ({METADATA_FILE} {error}); use an older one") from None
    _require_files(folder, tensors)
    return tensors


def _tensors(metadata: Any) -> Iterator[tuple[str, StoredTensor]]:
    fields = _state(metadata, "Metadata")
    places = {}
    for index, info in _dictionary(fields.get("storage_data")).items():
        named = _state(index, "MetadataIndex")
        offset = named.get("offset")
        places[_text(named.get("fqn")), None if offset is None else _size(offset)] = info
    _require_apart(places.values())
    for key, entry in _dictionary(fields.get("state_dict_metadata")).items():
        key = _text(key)
        if key.startswith(OPTIMIZER_PREFIX) or not _is(entry, "TensorStorageMetadata"):
            continue
        found = _state(entry, "TensorStorageMetadata")
        boxes = [_state(chunk, "ChunkStorageMetadata") for chunk in _sequence(found.get("chunks"))]
        chunks = tuple(_chunk(key, _size(box.get("offsets")), _size(box.get("sizes")), places) for box in boxes)
        yield key, StoredTensor(_size(found.get("size")), _dtype(key, found.get("properties")), chunks)


def _require_apart(infos: Iterable[Any]) -> None:
    """No two entries share bytes of a file."""
    last = ("", 0)
    for name, start, length in sorted(_place(info) for info in infos):
        if name == last[0] and start < last[1]:
            raise ValueError(f"has entries of {name} that overlap")
        last = (name, start + length)


def _place(info: Any) -> tuple[str, int, int]:
    """File, offset and length of an entry."""
    if not _is(info, "_StorageInfo", module="torch.distributed.checkpoint.filesystem"):
        raise ValueError("does not say where an entry is")
    place = _dictionary(info.state)
    if place.get("transform_descriptors"):
        raise ValueError("says that an entry is compressed, which no checkpoint of ours is")
    name = _text(place.get("relative_path"))
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"names {name[:200]!r}, expected file names inside the folder")
    return name, _count(place.get("offset")), _count(place.get("length"))


def _chunk(key: str, offsets: Shape, sizes: Shape, places: dict[tuple[str, Shape | None], Any]) -> Chunk:
    if (key, offsets) not in places:
        raise ValueError(f"says of {key} no place for the chunk at {list(offsets)}")
    return Chunk(offsets, sizes, *_place(places[key, offsets]))


def _require_cover(key: str, tensor: StoredTensor) -> None:
    """Every element of the tensor lies in exactly one chunk."""
    for chunk in tensor.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape) and all(
            offset + size <= whole for offset, size, whole in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)
        )
        if not inside:
            raise ValueError(f"has a chunk of {key} that lies outside its {list(tensor.shape)}")
        if chunk.length < math.prod(chunk.sizes) * tensor.dtype.itemsize:
            raise ValueError(f"gives a chunk of {key} fewer bytes than its numbers take")
    # Between two neighbouring edges of chunks, all elements lie in the same chunks: a grid of such cells is enough.
    edges = [
        sorted({0, whole, *(c.offsets[axis] + size for c in tensor.chunks for size in (0, c.sizes[axis]))})
        for axis, whole in enumerate(tensor.shape)
    ]
    if np.prod([float(len(axis)) for axis in edges]) > _MAX_CELLS:
        raise ValueError(f"has {len(tensor.chunks)} chunks of {key} in no order that a layout makes")
    filled = np.zeros([len(axis) - 1 for axis in edges], dtype=bool)
    number = [{edge: index for index, edge in enumerate(axis)} for axis in edges]
    for chunk in tensor.chunks:
        box = zip(number, chunk.offsets, chunk.sizes, strict=True)
        cells = tuple(slice(of[offset], of[offset + size]) for of, offset, size in box)
        if filled[cells].any():
            raise ValueError(f"has chunks of {key} that overlap")
        filled[cells] = True
    if not filled.all():
        raise ValueError(f"has too few chunks of {key} to fill its {list(tensor.shape)}")


def _require_files(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """Every file that a chunk names is there and long enough."""
    needed: dict[str, int] = {}
    for tensor in tensors.values():
        for chunk in tensor.chunks:
            needed[chunk.file] = max(needed.get(chunk.file, 0), chunk.start + chunk.length)
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if missing:
        raise UserError(f"checkpoint {folder} lacks {', '.join(missing)}: its save was cut short; use an older one")
    outside = sorted(name for name in needed if (folder / name).resolve().parent != folder.resolve())
    if outside:
        raise UserError(f"checkpoint {folder} has {', '.join(outside)} as links to other places; copy the files there")
    for name, size in sorted(needed.items()):
        found = (folder / name).stat().st_size
        if found < size:
            raise UserError(
                f"checkpoint {folder} is damaged: {name} has {found} bytes, expected {size}; copy it again or use an "
                "older one"
            )


def _is(value: Any, name: str, module: str = _METADATA) -> bool:
    return isinstance(value, Record) and value.name == f"{module}.{name}"


def _state(value: Any, name: str) -> dict[Any, Any]:
    """The fields of a dataclass."""
    if not _is(value, name) or not isinstance(value.state, dict):
        raise ValueError(f"has something else where it should hold a {name}")
    return value.state


def _dictionary(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError("lacks a dictionary that belongs to it")
    return value


def _sequence(value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError("lacks a list that belongs to it")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("lacks a name that belongs to it")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError("lacks a size that belongs to it")
    return value


def _size(value: Any) -> Shape:
    if not isinstance(value, Record) or value.name != "torch.Size":
        raise ValueError("lacks a size that belongs to it")
    sizes = _sequence(value.arguments[0]) if value.arguments else ()
    if len(sizes) > 16:
        raise ValueError("has a tensor of more than 16 axes")
    return tuple(_count(size) for size in sizes)


def _dtype(key: str, properties: Any) -> torch.dtype:
    """The type: first of the properties, which are a tuple (``TensorProperties.__getstate__``)."""
    if _is(properties, "TensorProperties") and isinstance(properties.state, tuple) and properties.state:
        name = properties.state[0]
        if isinstance(name, Name) and name.name.removeprefix("torch.") in _TYPES:
            dtype: torch.dtype = getattr(torch, name.name.removeprefix("torch."))
            return dtype
    raise ValueError(f"does not say which type {key} has")
