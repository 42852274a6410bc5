"""What torch's distributed checkpoint reads a checkpoint with: no byte of it is used before it fits its checksum.

torch's own reader un-pickles the metadata, whatever it names, and ``torch.load`` ignores the CRC-32 of every record.
Here the metadata is what the closed reader made of it, and numbers go from the file into memory and are compared there:
each chunk is read once, by the ranks that need it.
"""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import torch as strategy
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from navil_megatron.config.errors import DamagedError
from navil_megatron.files.archive import find_numbers, read_plain
from navil_megatron.files.checkpoint_metadata import Chunk, Contents, Place
from navil_megatron.files.file_bytes import read_into

logger = logging.getLogger(__name__)


class CheckedReader(FileSystemReader):
    """Reads the entries of a checkpoint folder whose contents are known; ``unchecked`` notes what has no checksum."""

    def __init__(self, folder: Path, contents: Contents, unchecked: set[str]) -> None:
        super().__init__(folder)
        self.folder, self.contents, self.unchecked = folder, contents, unchecked
        self._chunks = {
            (key, chunk.offsets): chunk for key, tensor in contents.tensors.items() for chunk in tensor.chunks
        }
        self._room = torch.empty(0, dtype=torch.uint8)
        self._metadata = _as_torch_has_it(contents)

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        """What the checkpoint holds; nothing is read for it."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Gives the planner what it asks for, entry by entry as they lie in the files.

        Raises:
            DamagedError: An entry does not fit its checksum; it is named with its file.
        """
        wanted: dict[tuple[str, Any], list[Any]] = {}
        for item in plan.items:
            index = item.storage_index
            place = None if item.type == LoadItemType.BYTE_IO else tuple(index.offset or ())
            wanted.setdefault((index.fqn, place), []).append(item)
        for (key, offsets), items in sorted(wanted.items(), key=lambda entry: self._order(*entry[0])):
            if offsets is None:
                content = self._object(key)
                for item in items:
                    planner.load_bytes(item, io.BytesIO(content))
                continue
            stored = self._chunk(key, self._chunks[key, offsets])
            for item in items:
                target = planner.resolve_tensor(item).detach()
                target.copy_(narrow_tensor_by_index(stored, item.storage_offsets, item.lengths))
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _order(self, key: str, offsets: Any) -> tuple[str, int]:
        place = self.contents.objects[key] if offsets is None else self._chunks[key, offsets].place
        return place.file, place.start

    def _chunk(self, key: str, chunk: Chunk) -> torch.Tensor:
        """A whole chunk, until the next one is read."""
        dtype = self.contents.tensors[key].dtype
        try:
            numbers = find_numbers(self.folder, chunk, dtype)
            if self._room.numel() < numbers.num_bytes:
                self._room = torch.empty(numbers.num_bytes, dtype=torch.uint8)
            content = memoryview(self._room.numpy())[: numbers.num_bytes]
            read_into(numbers.path, numbers.position, content, is_last=False)  # other ranks of the node read it, too
            numbers.require_same(content)
        except ValueError as error:
            raise self._damaged(key, chunk.place, error) from None
        if numbers.num_bytes and not numbers.crc:
            self.unchecked.add(key)
        stored = self._room[: numbers.num_bytes].view(getattr(torch, dtype))
        return stored.as_strided(numbers.shape, numbers.strides, numbers.first)

    def _object(self, key: str) -> bytes:
        """What is no tensor, written anew: core un-pickles it without ``weights_only``."""
        place = self.contents.objects[key]
        try:
            plain = torch.load(io.BytesIO(read_plain(self.folder, place)), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever the damage leads to
            raise self._damaged(key, place, error) from None
        written = io.BytesIO()
        torch.save(plain, written)
        return written.getvalue()

    def _damaged(self, key: str, place: Place, error: Exception) -> DamagedError:
        problem = " ".join(str(error).split())[:200]
        return DamagedError(f"checkpoint {self.folder} is damaged: {key} in {place.file} {problem}")


@contextmanager
def checked_reading(folder: Path, contents: Contents) -> Iterator[None]:
    """Core makes its readers itself and takes none of ours: in this block, every one that it makes is a checked one.

    Raises:
        DamagedError: An entry that was read does not fit its checksum.
    """
    unchecked: set[str] = set()

    def make(*_: Any, **__: Any) -> CheckedReader:
        return CheckedReader(folder, contents, unchecked)

    made = strategy._get_filesystem_reader
    strategy._get_filesystem_reader = serialization._get_filesystem_reader = make
    try:
        yield
    except CheckpointException as error:
        causes = (cause for cause, _ in error.failures.values())
        raise next((cause for cause in causes if isinstance(cause, DamagedError)), error) from None
    finally:
        strategy._get_filesystem_reader = serialization._get_filesystem_reader = made
    if unchecked:
        logger.warning("%s has %d entries without a checksum, which could not be checked", folder, len(unchecked))


def _as_torch_has_it(contents: Contents) -> metadata.Metadata:
    entries: dict[str, Any] = {key: metadata.BytesStorageMetadata() for key in contents.objects}
    storage = {metadata.MetadataIndex(key): _info(place) for key, place in contents.objects.items()}
    for key, tensor in contents.tensors.items():
        boxes = [(torch.Size(chunk.offsets), torch.Size(chunk.sizes), chunk.place) for chunk in tensor.chunks]
        entries[key] = metadata.TensorStorageMetadata(
            metadata.TensorProperties(dtype=getattr(torch, tensor.dtype)),
            torch.Size(tensor.shape),
            [metadata.ChunkStorageMetadata(offsets, sizes) for offsets, sizes, _ in boxes],
        )
        storage |= {metadata.MetadataIndex(key, offsets): _info(place) for offsets, _, place in boxes}
    return metadata.Metadata(entries, storage_data=storage, storage_meta=metadata.StorageMeta())


def _info(place: Place) -> _StorageInfo:
    return _StorageInfo(place.file, place.start, place.length)
