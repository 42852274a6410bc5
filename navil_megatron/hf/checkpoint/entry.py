"""Where the numbers of one chunk lie in its file.

A chunk is what ``torch.save`` made of one tensor: a zip archive that is not compressed, with a small pickle that says
type and shape and one record of raw numbers. Only the pickle is read here, as data.
"""

import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from navil_megatron.blueprint.parameters import Shape
from navil_megatron.files.file_bytes import FileWindow
from navil_megatron.hf.checkpoint.inert_pickle import Name, Outside, Record, read_pickle
from navil_megatron.hf.checkpoint.metadata import Chunk

_REBUILD = "torch._utils._rebuild_tensor_v2"
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
ALLOWED = frozenset({_REBUILD, "collections.OrderedDict", *_STORAGES})
"""Every name that the pickle of a tensor may hold."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True, slots=True)
class Entry:
    """The numbers of a chunk in their file."""

    position: int
    """Byte in the file at which the storage starts."""
    num_stored: int
    """Numbers in the storage."""
    crc: int
    """CRC-32 of the storage; 0: none was kept."""
    first: int
    """Number of the storage that is the first of the tensor."""
    strides: Shape
    """Numbers from one element to the next, for each axis."""


def find_entry(path: Path, chunk: Chunk, dtype: torch.dtype) -> Entry:
    """Finds the numbers of a chunk.

    Raises:
        ValueError: The archive is damaged or does not hold the tensor that the metadata says.
    """
    window = FileWindow(path, chunk.start, chunk.length)
    try:
        with zipfile.ZipFile(window) as archive:
            if min(record.header_offset for record in archive.infolist()) != 0:
                raise ValueError("starts with something that is not its archive")
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError("is not the archive of one tensor")
            prefix = pickles[0].removesuffix("data.pkl")
            tensor = read_pickle(_small(archive, pickles[0]), ALLOWED)
            if f"{prefix}byteorder" in archive.NameToInfo and _small(archive, f"{prefix}byteorder") != b"little":
                raise ValueError("was not saved on a little-endian machine")
            key, num_stored, first, sizes, strides = _described(tensor, dtype)
            record = archive.NameToInfo.get(f"{prefix}data/{key}")
            if record is None or record.compress_type != zipfile.ZIP_STORED:
                raise ValueError("holds no plain record of numbers")
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, OverflowError, struct.error) as error:
        raise ValueError(f"is no sound archive ({type(error).__name__})") from None
    if sizes != chunk.sizes or record.file_size != num_stored * dtype.itemsize:
        raise ValueError(f"holds {list(sizes)}, where the metadata says {list(chunk.sizes)}")
    last = first + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if 0 not in sizes and last >= num_stored:
        raise ValueError("describes a tensor that is larger than its numbers")
    position = _start_of(window, record.header_offset)
    if position + record.file_size > chunk.length:
        raise ValueError("ends within the numbers")
    return Entry(chunk.start + position, num_stored, record.CRC, first, strides)


def _small(archive: zipfile.ZipFile, name: str) -> bytes:
    record = archive.NameToInfo[name]
    if record.compress_type != zipfile.ZIP_STORED or record.file_size > FileWindow.LARGEST_READ:
        raise ValueError(f"has a {name.rpartition('/')[2]} that is packed or too large")
    start = _start_of(archive.fp, record.header_offset)  # without zipfile's check of a CRC that may not be kept
    archive.fp.seek(start)  # type: ignore[union-attr]
    content: bytes = archive.fp.read(record.file_size)  # type: ignore[union-attr]
    if record.CRC and zlib.crc32(content) != record.CRC:
        raise ValueError(f"has a damaged {name.rpartition('/')[2]}")
    return content


def _start_of(window: Any, header_offset: int) -> int:
    """Where a record's bytes start, behind its local header."""
    window.seek(header_offset)
    content = window.read(_LOCAL_HEADER.size)
    if len(content) < _LOCAL_HEADER.size or content[:4] != b"PK\x03\x04":
        raise ValueError("has a record without a header")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(content)
    return header_offset + _LOCAL_HEADER.size + int(name_length) + int(extra_length)


def _described(tensor: Any, dtype: torch.dtype) -> tuple[str, int, int, Shape, Shape]:
    """Record, numbers in it, first of them, shape and strides, as the pickle says them."""
    if not isinstance(tensor, Record) or tensor.name != _REBUILD or len(tensor.arguments) < 4:
        raise ValueError("does not hold a plain tensor")
    storage, first, sizes, strides = tensor.arguments[:4]
    reference = storage.reference if isinstance(storage, Outside) else None
    if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
        raise ValueError("does not say where its numbers are")
    _, kind, key, _, num_stored = reference
    found = _STORAGES.get(kind.name) if isinstance(kind, Name) else None
    if found != dtype:
        raise ValueError(f"holds {found}, where the metadata says {dtype}")
    numbers = (num_stored, first, *_counts(sizes), *_counts(strides))
    if not isinstance(key, str) or any(type(n) is not int or not 0 <= n < 2**62 for n in numbers):
        raise ValueError("does not say its sizes")
    if len(sizes) != len(strides):
        raise ValueError("does not say its sizes")
    return key, num_stored, first, tuple(sizes), tuple(strides)


def _counts(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) > 16:
        raise ValueError("does not say its sizes")
    return value
