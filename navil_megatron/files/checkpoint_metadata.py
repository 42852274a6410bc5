"""What a checkpoint folder holds and where, by its ``.metadata`` alone: nothing in it is imported, called or built.

megatron-core's ``torch_dist`` format is PyTorch's distributed checkpoint: ``.metadata`` is a pickle that gives, for
every tensor, its size, type and chunks, and for every chunk and every other object a file, an offset and a length.
Torch's own reader would import and call whatever it names.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from navil_megatron.config.errors import DamagedError, UserError
from navil_megatron.files.checkpoint_folder import METADATA_FILE, OPTIMIZER_PREFIX
from navil_megatron.files.closed_pickle import StandIn, read_pickle

_BYTES_OF_TYPES = {
    **dict.fromkeys(("bool", "int8", "uint8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "float32"), 4),
    **dict.fromkeys(("int64", "float64", "complex64"), 8),
    "complex128": 16,
}
_DCP = "torch.distributed.checkpoint"
_CLASSES = {
    "metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "filesystem": ("_StorageInfo",),
    # Core leaves every rank's plan in the metadata, to save the next checkpoint faster.
    "planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
}
_ALLOWED = frozenset(
    {
        *(f"torch.{name}" for name in _BYTES_OF_TYPES),
        *("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict"),
        *("pathlib.PosixPath", "pathlib._local.PosixPath"),  # where it was saved
        *(f"{_DCP}.{module}.{name}" for module, names in _CLASSES.items() for name in names),
    }
)
_MAX_CELLS = 1_000_000

type Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a file of the folder."""

    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and the bytes that hold it: an archive by ``torch.save``."""

    offsets: Shape
    sizes: Shape
    place: Place


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    shape: Shape
    dtype: str
    """Torch's name, e.g. ``bfloat16``."""
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds."""

    tensors: dict[str, StoredTensor]
    """Chunks fill each one exactly, and lie in existing files."""
    objects: dict[str, Place]
    """What is no tensor, each a pickle by ``torch.save``."""

    @property
    def weights(self) -> dict[str, StoredTensor]:
        """Every tensor that is not optimizer state."""
        return {key: tensor for key, tensor in self.tensors.items() if not key.startswith(OPTIMIZER_PREFIX)}


def read_metadata(folder: Path) -> Contents:
    """What a checkpoint holds and where.

    Raises:
        UserError: The folder is not a complete checkpoint, or its metadata is damaged or names what it may not.
    """
    path = folder / METADATA_FILE
    if not path.is_file():
        raise DamagedError(f"{folder} has no {METADATA_FILE}: its save was cut short; use an older checkpoint")
    try:
        contents = _contents(read_pickle(path.read_bytes(), _ALLOWED))
        for key, tensor in contents.tensors.items():
            _require_cover(key, tensor)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        problem = error if isinstance(error, ValueError) else "lacks something that belongs to it"
        raise DamagedError(f"checkpoint {folder} is damaged ({METADATA_FILE} {problem}); use an older one") from None
    chunks = (chunk.place for tensor in contents.tensors.values() for chunk in tensor.chunks)
    _require_files(folder, [*chunks, *contents.objects.values()])
    return contents


def _contents(metadata: Any) -> Contents:
    fields = _fields(metadata, "metadata.Metadata")
    places: dict[tuple[str, Shape | None], Place] = {}
    for index, info in fields["storage_data"].items():
        named = _fields(index, "metadata.MetadataIndex")
        offset = named.get("offset")
        places[_text(named["fqn"]), None if offset is None else _size(offset)] = _place(info)
    _require_apart(places.values())
    contents = Contents({}, {})
    for key, entry in fields["state_dict_metadata"].items():
        if _is(entry, "metadata.TensorStorageMetadata"):
            contents.tensors[_text(key)] = _tensor(key, entry, places)
        else:
            contents.objects[_text(key)] = places[key, None]
    return contents


def _tensor(key: str, entry: StandIn, places: dict[tuple[str, Shape | None], Place]) -> StoredTensor:
    fields = _fields(entry, "metadata.TensorStorageMetadata")
    chunks = []
    for chunk in fields["chunks"]:
        box = _fields(chunk, "metadata.ChunkStorageMetadata")
        offsets = _size(box["offsets"])
        if (key, offsets) not in places:
            raise ValueError(f"says of {key} no place for the chunk at {list(offsets)}")
        chunks.append(Chunk(offsets, _size(box["sizes"]), places[key, offsets]))
    properties = fields["properties"]  # a tuple (``TensorProperties.__getstate__``), the type first
    dtype = properties.state[0].name.removeprefix("torch.") if _is(properties, "metadata.TensorProperties") else ""
    if dtype not in _BYTES_OF_TYPES:
        raise ValueError(f"does not say which type {key} has")
    return StoredTensor(_size(fields["size"]), dtype, tuple(chunks))


def _place(info: Any) -> Place:
    fields = _fields(info, "filesystem._StorageInfo")
    if fields.get("transform_descriptors"):
        raise ValueError("says that an entry is compressed, which no checkpoint of ours is")
    file = _text(fields["relative_path"])
    if Path(file).name != file or file in ("", ".", ".."):
        raise ValueError(f"names {file[:200]!r}, expected file names inside the folder")
    return Place(file, _count(fields["offset"]), _count(fields["length"]))


def _require_apart(places: Iterable[Place]) -> None:
    """No two entries share bytes of a file."""
    in_order = sorted(places, key=lambda place: (place.file, place.start, place.length))
    for place, following in itertools.pairwise(in_order):
        if place.file == following.file and following.start < place.start + place.length:
            raise ValueError(f"has entries of {place.file} that overlap")


def _require_cover(key: str, tensor: StoredTensor) -> None:
    """Every element of the tensor lies in exactly one chunk."""
    for chunk in tensor.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape) and all(
            offset + size <= whole for offset, size, whole in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)
        )
        if not inside:
            raise ValueError(f"has a chunk of {key} that lies outside its {list(tensor.shape)}")
        if chunk.place.length < math.prod(chunk.sizes) * _BYTES_OF_TYPES[tensor.dtype]:
            raise ValueError(f"gives a chunk of {key} fewer bytes than its numbers take")
    # Between two neighbouring edges of chunks, all elements lie in the same chunks: a grid of such cells is enough.
    edges = [
        sorted({0, whole, *(c.offsets[axis] + size for c in tensor.chunks for size in (0, c.sizes[axis]))})
        for axis, whole in enumerate(tensor.shape)
    ]
    num_cells = math.prod(len(axis) - 1 for axis in edges)
    if num_cells > _MAX_CELLS:
        raise ValueError(f"has {len(tensor.chunks)} chunks of {key} in no order that a layout makes")
    filled: set[Shape] = set()
    for chunk in tensor.chunks:
        box = zip(edges, chunk.offsets, chunk.sizes, strict=True)
        for cell in itertools.product(*(range(of.index(start), of.index(start + size)) for of, start, size in box)):
            if cell in filled:
                raise ValueError(f"has chunks of {key} that overlap")
            filled.add(cell)
    if len(filled) < num_cells:
        raise ValueError(f"has too few chunks of {key} to fill its {list(tensor.shape)}")


def _require_files(folder: Path, places: Iterable[Place]) -> None:
    """Every file that is named is there and long enough."""
    needed: dict[str, int] = {}
    for place in places:
        needed[place.file] = max(needed.get(place.file, 0), place.start + place.length)
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if missing:
        raise DamagedError(f"checkpoint {folder} lacks {', '.join(missing)}: its save was cut short; use an older one")
    outside = sorted(name for name in needed if (folder / name).resolve().parent != folder.resolve())
    if outside:
        raise UserError(f"checkpoint {folder} has {', '.join(outside)} as links to other places; copy the files there")
    for name, size in sorted(needed.items()):
        found = (folder / name).stat().st_size
        if found < size:
            raise DamagedError(
                f"checkpoint {folder} is damaged: {name} has {found} bytes, expected {size}; copy it again or use an "
                "older one"
            )


def _is(value: Any, name: str) -> bool:
    return isinstance(value, StandIn) and value.name == f"{_DCP}.{name}"


def _fields(value: Any, name: str) -> dict[str, Any]:
    if not _is(value, name) or not isinstance(value.state, dict):
        raise ValueError(f"has something else where it should hold a {name.partition('.')[2]}")
    return value.state


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("lacks a name that belongs to it")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError("lacks a size that belongs to it")
    return value


def _size(value: Any) -> Shape:
    if not isinstance(value, StandIn) or value.name != "torch.Size" or len(value.arguments[0]) > 16:
        raise ValueError("lacks a size that belongs to it")
    return tuple(map(_count, value.arguments[0]))
