"""A checkpoint written tensor by tensor, without ranks: what megatron-core loads at any layout.

megatron-core's ``torch_dist`` format is PyTorch's distributed checkpoint plus ``metadata.json`` and one object that
holds the common state. Every layer is a chunk of its own, as core itself saves it, in files of about a gigabyte so that
several processes can write at the same time. Chunks are torch's (``torch.save``), the metadata's classes too; its
``FileSystemWriter`` would note the folder's path and a random name, so that no two conversions wrote the same bytes.
"""

import io
import itertools
import json
import pickle
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from navil_megatron.blueprint.parameters import Shape
from navil_megatron.files.checkpoint_folder import FORMAT_FILE, METADATA_FILE
from navil_megatron.files.checkpoint_metadata import Chunk, Place
from navil_megatron.files.file_bytes import write_behind
from navil_megatron.hf.hf_parameters import Slot
from navil_megatron.hf.memory import raw_bytes

COMMON_STATE_KEY = "common_state/shard_0_1"
"""Where core keeps what is not a tensor: a list with one object per process that saved."""
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
"""What core calls the format in ``metadata.json``."""


@dataclass(frozen=True, slots=True)
class Written:
    """A chunk that was written, and of which tensor."""

    key: str
    shape: Shape  # of the whole tensor
    dtype: torch.dtype
    chunk: Chunk


class CheckpointWriter:
    """Writes the tensors of a checkpoint folder. Pickles, so that processes can share it."""

    def __init__(self, folder: Path, share_bytes: int = 1_000_000_000) -> None:
        """Each share of the jobs becomes a file, of about ``share_bytes``."""
        self.folder, self.share_bytes = folder, share_bytes

    def write(self, share: int, tensors: Iterable[tuple[Slot, torch.Tensor]]) -> list[Written]:
        """Writes tensors, in order, as one file; says where each went."""
        name = f"__0_{share}.distcp"
        written = []
        with (self.folder / name).open("wb") as stream, write_behind() as wrote:
            for slot, tensor in tensors:
                for first_row, piece in _pieces(tensor, self.share_bytes):
                    offsets = (first_row, *(0 for _ in slot.shape[1:])) if slot.shape else ()
                    if slot.layer is None:
                        written.append(save_chunk(stream, slot.key, slot.shape, offsets, piece))
                    else:
                        shape = (slot.num_layers or 1, *slot.shape)
                        written.append(save_chunk(stream, slot.key, shape, (slot.layer, *offsets), piece[None]))
                    stream.flush()
                    wrote(stream.fileno(), written[-1].chunk.place.length)
        return written

    def finish(self, places: Iterable[Iterable[Written]]) -> list[str]:
        """Writes what makes the files a checkpoint; gives the names of all files."""
        shares = list(places)
        return finish_checkpoint(self.folder, itertools.chain.from_iterable(shares), f"__0_{len(shares)}.distcp")


def save_chunk(stream: BinaryIO, key: str, shape: Shape, offsets: Shape, chunk: torch.Tensor) -> Written:
    """Appends a chunk of a tensor of that shape to a file."""
    start = stream.tell()
    try:
        torch.save(_alone(chunk), stream)
    except RuntimeError as error:
        # Where the disk is full in the middle of a record, torch stumbles over its own end of the archive.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    place = Place(Path(stream.name).name, start, stream.tell() - start)
    return Written(key, shape, chunk.dtype, Chunk(offsets, tuple(chunk.shape), place))


def finish_checkpoint(folder: Path, chunks: Iterable[Written], common_file: str) -> list[str]:
    """Writes the common state into a file of that name, and the metadata; gives the names of all files."""
    # These take a second and a half to import, which an export need not wait for.
    from torch.distributed.checkpoint import metadata as table
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    common = io.BytesIO()
    # Core reads a list with one object per process that saved; weights alone have no common state.
    torch.save([{}], common)
    (folder / common_file).write_bytes(common.getbuffer())
    entries: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for written in chunks:
        # A pickle stores an object once, so names that went through another process must become one again.
        key, chunk, place = sys.intern(written.key), written.chunk, written.chunk.place
        if key not in entries:
            properties = table.TensorProperties(dtype=written.dtype)
            entries[key] = table.TensorStorageMetadata(properties, torch.Size(written.shape), [])
        entries[key].chunks.append(table.ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
        index = table.MetadataIndex(key, chunk.offsets)
        storage[index] = _StorageInfo(sys.intern(place.file), place.start, place.length)
    files = sorted({info.relative_path for info in storage.values()})
    entries[COMMON_STATE_KEY] = table.BytesStorageMetadata()
    storage[table.MetadataIndex(COMMON_STATE_KEY)] = _StorageInfo(common_file, 0, len(common.getbuffer()))
    whole = table.Metadata(entries, storage_data=storage, storage_meta=table.StorageMeta())
    (folder / METADATA_FILE).write_bytes(pickle.dumps(whole))
    (folder / FORMAT_FILE).write_text(json.dumps(FORMAT) + "\n")
    return [*files, common_file, METADATA_FILE, FORMAT_FILE]


def _pieces(tensor: torch.Tensor, most: int) -> Iterable[tuple[int, torch.Tensor]]:
    """The tensor as blocks of rows of about so many bytes, with the first row of each."""
    if tensor.nbytes <= most:
        return [(0, tensor)]
    rows = max(1, most * len(tensor) // tensor.nbytes)
    return zip(range(0, len(tensor), rows), tensor.split(rows), strict=True)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that owns nothing else, because ``torch.save`` writes all that a tensor owns."""
    content = torch.frombuffer(raw_bytes(tensor), dtype=tensor.dtype) if tensor.numel() else tensor.clone()
    return content.view(tensor.shape)
