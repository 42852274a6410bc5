"""The index of one source: a single file over all its shards, memory-mapped, with what planning needs and no pixel.

A header, one 20-byte record a sample, one 12-byte record an image, then the list of shards as JSON. Tars place their
members at multiples of 512 bytes, so positions are kept in such blocks. Token counts hold for one tokenizer, which the
header names.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from navil_megatron.config.errors import UserError
from navil_megatron.files.atomic_file import new_file

BLOCK = 512
HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("num_shards", "<u4"),
        ("num_samples", "<u8"),
        ("num_images", "<u8"),
        ("shard_list_bytes", "<u8"),
        ("tokenizer", "V16"),  # fingerprint behind text_tokens
        ("content", "V16"),  # digest of all shards
    ]
)
SAMPLE = np.dtype(
    [
        ("text_block", "<u4"),  # where the bytes of the text member begin
        ("text_bytes", "<u4"),
        ("text_tokens", "<u4"),  # every token that does not stand for an image, control tokens included
        ("first_image", "<u4"),  # in the table of images
        ("num_images", "<u2"),
        ("name_blocks", "u1"),  # tar header in front of the text member
        ("kind", "u1"),
    ]
)
IMAGE = np.dtype(
    [
        ("block", "<u4"),
        ("bytes", "<u4"),
        ("height", "<u2"),  # as the picture is meant to be seen, EXIF orientation applied
        ("width", "<u2"),
    ]
)
KIND_TEXT, KIND_JSON, KIND_CONVERSATION = range(3)
"""A text member is the caption itself, JSON with a ``caption``, or JSON with ``conversations`` or ``messages``."""
MAGIC = b"NAVILIDX"
VERSION = 2
MAX_IMAGES = 2**32 - 1  # images that one index can hold; a source with more is indexed in two


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of a source."""

    path: str  # path or URL; a relative path is relative to the folder of the index
    num_samples: int  # samples that the index holds of it
    num_bytes: int  # size of the tar when it was indexed
    content: str  # 32 hexadecimal digits: digest of its samples' keys and bytes


@dataclass(frozen=True, slots=True)
class ShardEntries:
    """What one tar adds to an index."""

    samples: np.ndarray  # [n] of ``SAMPLE``; ``first_image`` counts from the shard's first image
    images: np.ndarray  # [m] of ``IMAGE``
    shard: Shard
    rejected: list[tuple[str, str]]  # (key, reason) of every sample that was left out


def save_index(
    path: Path, read: Callable[[], "Iterable[ShardEntries | SourceIndex]"], shards: Sequence[Shard], tokenizer: str
) -> None:
    """Writes an index; a reader sees the old one or the new one, never a piece.

    ``read`` gives the entries of each shard, as often as it is called; ``tokenizer`` is its fingerprint.

    Raises:
        UserError: more images than an index can hold.
    """
    num_images = sum(len(entries.images) for entries in read())
    if num_images > MAX_IMAGES:
        raise UserError(f"index {path} would hold {num_images} images, at most {MAX_IMAGES} fit: index in two parts")
    names = json.dumps([astuple(shard) for shard in shards], separators=(",", ":")).encode()
    header = np.zeros((), dtype=HEADER)
    header["magic"], header["version"], header["num_shards"] = MAGIC, VERSION, len(shards)
    header["num_samples"], header["num_images"] = sum(shard.num_samples for shard in shards), num_images
    header["shard_list_bytes"] = len(names)
    header["tokenizer"], header["content"] = np.void(bytes.fromhex(tokenizer)), np.void(digest_shards(shards))
    with new_file(path) as file:
        file.write(header.tobytes())
        first_image = 0
        for entries in read():
            samples = entries.samples.copy()
            samples["first_image"] += first_image
            first_image += len(entries.images)
            file.write(samples.tobytes())
        for entries in read():
            file.write(entries.images.tobytes())
        file.write(names)


def digest_shards(shards: Sequence[Shard]) -> bytes:
    """16 bytes that name the samples and their order: file names and contents, wherever the shards lie."""
    digest = hashlib.sha256()
    for shard in shards:
        name = os.path.basename(shard.path.partition("::")[0])  # of zip://a.tar::file://b.zip the first
        digest.update(f"{name}\0{shard.num_samples}\0{shard.content}\0".encode())
    return digest.digest()[:16]


class SourceIndex:
    """An open index. Nothing is read until it is asked for, so a billion samples open as fast as ten."""

    def __init__(self, path: str | Path) -> None:
        """Maps the file; UserError where it is missing, damaged or of another version."""
        self.path = Path(path)
        rebuild = "make it with: navil-megatron data index"
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise UserError(f"index {path} cannot be read ({error.strerror}): give its path, or {rebuild}") from None
        with file:
            header = _read_header(file, self.path, rebuild)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.tokenizer: str = header["tokenizer"].tobytes().hex()
        """Fingerprint of the tokenizer behind ``text_tokens``, 32 hexadecimal digits."""
        self.fingerprint: str = header["content"].tobytes().hex()
        """32 hexadecimal digits that name the samples and their order."""
        num_samples, num_images = int(header["num_samples"]), int(header["num_images"])
        images_at = HEADER.itemsize + num_samples * SAMPLE.itemsize
        self.samples = np.frombuffer(self._map, SAMPLE, num_samples, HEADER.itemsize)
        """[n] of ``SAMPLE``, in the order of the shards."""
        self.images = np.frombuffer(self._map, IMAGE, num_images, images_at)
        """[m] of ``IMAGE``."""
        try:
            self.shards = tuple(Shard(*entry) for entry in json.loads(self._map[images_at + self.images.nbytes :]))
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"index {path} is damaged (its list of shards): {rebuild}") from None
        counts = [shard.num_samples for shard in self.shards]
        self.starts = np.cumsum([0, *counts])
        """[num_shards + 1] int64: first sample of each shard."""
        if len(self.shards) != header["num_shards"] or self.starts[-1] != num_samples or min(counts, default=0) < 0:
            raise UserError(f"index {path} is damaged (its shards hold {self.starts[-1]} samples): {rebuild}")

    def __len__(self) -> int:
        return len(self.samples)

    def shard_number(self, index: int) -> int:
        """Which shard holds a sample."""
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def images_of(self, index: int) -> np.ndarray:
        """[num_images] of ``IMAGE``: the images of one sample, in order of appearance."""
        record = self.samples[index]
        first = int(record["first_image"])
        return self.images[first : first + int(record["num_images"])]

    def release(self) -> None:
        """Gives the memory of the pages that were read back to the machine; they are read again when needed."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _read_header(file: BinaryIO, path: Path, rebuild: str) -> np.void:
    """The header, if the file is as long as it says."""
    found = os.fstat(file.fileno()).st_size
    content = file.read(HEADER.itemsize)
    if len(content) < HEADER.itemsize:
        raise UserError(f"index {path} is damaged ({found} bytes): {rebuild}")
    header: np.void = np.frombuffer(content, HEADER)[0]
    if header["magic"] != MAGIC or header["version"] != VERSION:
        raise UserError(f"index {path} is damaged or of another version (expected version {VERSION}): {rebuild}")
    counts = (int(header["num_samples"]), int(header["num_images"]), int(header["shard_list_bytes"]))
    expected = HEADER.itemsize + counts[0] * SAMPLE.itemsize + counts[1] * IMAGE.itemsize + counts[2]
    if found != expected:
        raise UserError(f"index {path} is damaged ({found} bytes, expected {expected}): {rebuild}")
    return header
