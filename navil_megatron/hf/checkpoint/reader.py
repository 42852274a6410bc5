"""Tensors of a checkpoint, one layer at a time, whatever layout saved it: rows and columns of tensor parallelism,
stages, experts, or whole stacks of layers in one chunk.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.files.checkpoint_folder import FORMAT_FILE
from navil_megatron.files.checksums import read_checksums, require_digest
from navil_megatron.files.file_bytes import read_into
from navil_megatron.hf.checkpoint.entry import Entry, find_entry
from navil_megatron.hf.checkpoint.metadata import Chunk, StoredTensor, read_metadata
from navil_megatron.hf.plan import Slot
from navil_megatron.hf.tensor_bytes import raw_bytes
from navil_megatron.hf.verify import Signature

_DAMAGED = "differs from the checksum that its archive holds"
_BLOCK = 1 << 23


class CheckpointReader:
    """The model's tensors of a checkpoint folder; optimizer state is left out."""

    def __init__(self, folder: Path) -> None:
        """Reads the metadata and nothing else.

        Raises:
            UserError: The folder is not a complete checkpoint, or its metadata is damaged.
        """
        if not (folder / FORMAT_FILE).is_file():
            raise UserError(f"{folder} has no {FORMAT_FILE}: not a complete megatron-core checkpoint")
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = read_metadata(folder)
        self.checksums = read_checksums(folder)
        self._sound: set[tuple[str, int]] = set()

    def signatures(self) -> dict[str, Signature]:
        """Shape and type of every tensor, from the metadata."""
        return {key: (tensor.shape, tensor.dtype) for key, tensor in self.tensors.items()}

    def read(self, slot: Slot) -> torch.Tensor:
        """One tensor, or one layer of a stacked one, put together from the chunks that hold it.

        Raises:
            UserError: A file is damaged.
        """
        stored = self.tensors[slot.key]
        offset, size = (0, stored.shape[0] if stored.shape else 1) if slot.layer is None else (slot.layer, 1)
        window = torch.empty((size, *stored.shape[1:]), dtype=stored.dtype)
        place = self.folder
        for chunk in stored.chunks:
            start = chunk.offsets[0] if chunk.offsets else 0
            first = max(start, offset)
            last = min(start + (chunk.sizes[0] if chunk.sizes else 1), offset + size)
            if first < last:
                place = self.folder / chunk.file
                box = [slice(first - offset, last - offset)]
                box += [slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
                self._read_rows(slot, chunk, (first - start, last - start), window[tuple(box)])
        tensor = window.view(slot.shape)
        for name, part in self._named_parts(slot, window):
            require_digest(raw_bytes(part), name, self.checksums or {}, place)
        return tensor

    def _named_parts(self, slot: Slot, window: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """What has a checksum of its own: the slot itself, or the layers of a stack that is read whole."""
        if self.checksums is None:
            return
        if slot.layer is None and slot.name not in self.checksums and f"{slot.key}[0]" in self.checksums:
            yield from ((f"{slot.key}[{layer}]", part) for layer, part in enumerate(window))
        else:
            yield slot.name, window

    def _read_rows(self, slot: Slot, chunk: Chunk, rows: tuple[int, int], target: torch.Tensor) -> None:
        """Fills ``target`` with some rows of a chunk."""
        path = self.folder / chunk.file
        try:
            entry = find_entry(path, chunk, target.dtype)
            if self.checksums is not None:
                entry = replace(entry, crc=0)  # the hash of the whole slot says more
            if rows != (0, chunk.sizes[0] if chunk.sizes else 1):
                self._require_sound(path, entry, target.dtype.itemsize)
            if _is_plain(entry, chunk):
                _read_plain(path, entry, chunk, rows, target)
            else:
                _read_strided(path, entry, chunk, rows, target)
        except ValueError as error:
            raise UserError(
                f"checkpoint {self.folder} is damaged: {slot.name} in {chunk.file} {error}; copy it again or use an "
                "older one"
            ) from None

    def _require_sound(self, path: Path, entry: Entry, itemsize: int) -> None:
        """Checks all of an entry of which only some rows are wanted, once."""
        if not entry.crc or (path.name, entry.position) in self._sound:
            return
        content, left, position, crc = bytearray(_BLOCK), entry.num_stored * itemsize, entry.position, 0
        while left:
            block = memoryview(content)[: min(left, _BLOCK)]
            read_into(path, position, block)
            left, position, crc = left - len(block), position + len(block), zlib.crc32(block, crc)
        if crc != entry.crc:
            raise ValueError(_DAMAGED)
        self._sound.add((path.name, entry.position))


def _is_plain(entry: Entry, chunk: Chunk) -> bool:
    """Whether the numbers lie row by row and nothing lies beside them."""
    strides = [math.prod(chunk.sizes[axis + 1 :]) for axis in range(len(chunk.sizes))]
    regular = all(
        mine == theirs or size == 1 for mine, theirs, size in zip(entry.strides, strides, chunk.sizes, strict=True)
    )
    return regular and entry.num_stored == math.prod(chunk.sizes)


def _read_plain(path: Path, entry: Entry, chunk: Chunk, rows: tuple[int, int], target: torch.Tensor) -> None:
    row_bytes = math.prod(chunk.sizes[1:]) * target.dtype.itemsize
    inner = chunk.sizes[1:]
    into = target if target.is_contiguous() else torch.empty((rows[1] - rows[0], *inner), dtype=target.dtype)
    content = raw_bytes(into)
    read_into(path, entry.position + rows[0] * row_bytes, content)
    if len(content) == entry.num_stored * target.dtype.itemsize:
        _require_crc(content, entry)
    if into is not target:
        target.copy_(into)


def _read_strided(path: Path, entry: Entry, chunk: Chunk, rows: tuple[int, int], target: torch.Tensor) -> None:
    storage = torch.empty(entry.num_stored, dtype=target.dtype)
    content = raw_bytes(storage)
    read_into(path, entry.position, content)
    _require_crc(content, entry)
    whole = storage.as_strided(chunk.sizes, entry.strides, entry.first)
    target.copy_(whole[rows[0] : rows[1]] if chunk.sizes else whole)


def _require_crc(content: memoryview, entry: Entry) -> None:
    if entry.crc and zlib.crc32(content) != entry.crc:
        raise ValueError(_DAMAGED)
