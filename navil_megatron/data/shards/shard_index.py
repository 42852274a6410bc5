"""The index of one source: a single file over all its shards, memory-mapped, with what planning needs and no pixel.

A header, one 24-byte record a sample, one 16-byte record an image, a hash of every 1024 records, then the list of
shards as JSON. Tars place their members at multiples of 512 bytes, so positions are kept in such blocks. Token counts
hold for one tokenizer, which the header names. No byte is used unchecked: the header holds a hash of itself, the hashes
and the list, all read when it is opened; records are compared with theirs when they are first asked for.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from navil_megatron.config.errors import DamagedError, UserError
from navil_megatron.files.atomic_file import new_file
from navil_megatron.files.hashes import check

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
        ("check", "<u8"),  # of what stands above, the hashes of records, and the list of shards
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
        ("check", "<u4"),  # hash of the text member's bytes
    ]
)
IMAGE = np.dtype(
    [
        ("block", "<u4"),
        ("bytes", "<u4"),
        ("height", "<u2"),  # as the picture is meant to be seen, EXIF orientation applied
        ("width", "<u2"),
        ("check", "<u4"),  # hash of the file's bytes
    ]
)
KIND_TEXT, KIND_JSON, KIND_CONVERSATION, KIND_INTERLEAVED_TEXT, KIND_INTERLEAVED_JSON = range(5)
"""A text member is the caption itself, JSON with a caption, or JSON with ``conversations`` or ``messages``. The last
two are the first two where images stand in the text; older indexes lack them: there a mark in a caption is text."""
MAGIC = b"NAVILIDX"
VERSION = 3
RECORDS_OF_A_CHECK = 1024
_CHECK = np.dtype("<u8")
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
        file.seek(HEADER.itemsize)
        checks = [*_write_table(file, _samples_of(read())), *_write_table(file, (e.images[:] for e in read()))]
        rest = np.array(checks, dtype=_CHECK).tobytes() + names
        file.write(rest)
        header["check"] = check(header.tobytes() + rest)
        file.seek(0)
        file.write(header.tobytes())


def _samples_of(entries: "Iterable[ShardEntries | SourceIndex]") -> Iterator[np.ndarray]:
    first_image = 0
    for some in entries:
        samples = some.samples[:].copy()
        samples["first_image"] += first_image
        first_image += len(some.images)
        yield samples


def _write_table(file: BinaryIO, pieces: Iterable[np.ndarray]) -> Iterator[int]:
    """Appends records, and gives the hashes of them."""
    rest = b""
    for piece in pieces:
        content = piece.tobytes()
        file.write(content)
        rest += content
        size = piece.itemsize * RECORDS_OF_A_CHECK
        whole = len(rest) - len(rest) % size
        yield from (check(rest[start : start + size]) for start in range(0, whole, size))
        rest = rest[whole:]
    if rest:
        yield check(rest)


def digest_shards(shards: Sequence[Shard]) -> bytes:
    """16 bytes that name the samples and their order: file names and contents, wherever the shards lie."""
    digest = hashlib.sha256()
    for shard in shards:
        name = os.path.basename(shard.path.partition("::")[0])  # of zip://a.tar::file://b.zip the first
        digest.update(f"{name}\0{shard.num_samples}\0{shard.content}\0".encode("utf-8", "surrogateescape"))
    return digest.digest()[:16]


class Table:
    """Records of a mapped file, taken by number, slice, [n] numbers, or field; checked when first asked for."""

    def __init__(self, records: np.ndarray, checks: np.ndarray, damaged: Callable[[str], DamagedError]) -> None:
        """``checks`` are the hashes of the records; ``damaged`` makes an error of what is wrong."""
        self._records, self._checks, self._damaged = records, checks, damaged
        self._is_sound = np.zeros(len(checks), dtype=bool)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, which: Any) -> Any:
        """The records, as numpy gives them; DamagedError: they differ from their hash, or there are none."""
        first, last = 0, len(self) - 1
        if isinstance(which, np.ndarray):
            if which.size and not 0 <= which.min() <= which.max() < len(self):
                raise self._damaged("it refers to records that it does not hold")
        elif isinstance(which, slice):
            chosen = range(len(self))[which]
            first, last = (min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1])) if chosen else (0, -1)
        elif not isinstance(which, str | list):
            first = last = range(len(self))[which]
        if isinstance(which, np.ndarray):
            blocks = np.unique(which // RECORDS_OF_A_CHECK)
        else:
            blocks = np.arange(first // RECORDS_OF_A_CHECK, last // RECORDS_OF_A_CHECK + 1)
        for block in blocks[~self._is_sound[blocks]].tolist():
            start = block * RECORDS_OF_A_CHECK
            if check(self._records[start : start + RECORDS_OF_A_CHECK].tobytes()) != self._checks[block]:
                raise self._damaged(f"records from {start} on differ from their checksum")
            self._is_sound[block] = True
        return self._records[which]


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
        checks_at = images_at + num_images * IMAGE.itemsize
        bare = header.copy()
        bare["check"] = 0
        if check(bare.tobytes() + self._map[checks_at:]) != header["check"]:
            raise self.damaged("its header or what follows its records differs from its checksum")
        num_sample_checks, num_image_checks = _num_checks(num_samples), _num_checks(num_images)
        checks = np.frombuffer(self._map, _CHECK, num_sample_checks + num_image_checks, checks_at)
        samples = np.frombuffer(self._map, SAMPLE, num_samples, HEADER.itemsize)
        images = np.frombuffer(self._map, IMAGE, num_images, images_at)
        self.samples = Table(samples, checks[:num_sample_checks], self.damaged)
        """[n] of ``SAMPLE``, in the order of the shards."""
        self.images = Table(images, checks[num_sample_checks:], self.damaged)
        """[m] of ``IMAGE``."""
        try:
            self.shards = tuple(Shard(*entry) for entry in json.loads(self._map[checks_at + checks.nbytes :]))
            if any([*map(type, astuple(shard))] != [str, int, int, str] for shard in self.shards):
                raise TypeError("a shard is described by other types")
            counts = [shard.num_samples for shard in self.shards]
            self.starts = np.cumsum([0, *counts])
            """[num_shards + 1] int64: first sample of each shard."""
        except (ValueError, TypeError, RecursionError):
            raise self.damaged("its list of shards") from None
        if len(self.shards) != header["num_shards"] or self.starts[-1] != num_samples or min(counts, default=0) < 0:
            raise self.damaged(f"its shards hold {self.starts[-1]} samples")

    def damaged(self, problem: str) -> DamagedError:
        """An error that says so."""
        return DamagedError(
            f"index {self.path} is damaged ({problem}): restore it, or make it anew with: navil-megatron data index"
        )

    def __len__(self) -> int:
        return len(self.samples)

    def shard_number(self, index: int) -> int:
        """Which shard holds a sample."""
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def images_of(self, index: int) -> np.ndarray:
        """[num_images] of ``IMAGE``: the images of one sample, in order of appearance; DamagedError: there are none."""
        record = self.samples[index]
        first, count = int(record["first_image"]), int(record["num_images"])
        if first + count > len(self.images):
            raise self.damaged(f"sample {index} has images that it does not hold")
        images: np.ndarray = self.images[first : first + count]
        return images

    def check_records(self) -> None:
        """Compares all records with their hashes; DamagedError: they differ."""
        for table in (self.samples, self.images):
            for start in range(0, len(table), 2**20):
                table[start : start + 2**20]
            self.release()

    def release(self) -> None:
        """Gives the memory of the pages that were read back to the machine; they are read again when needed."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _num_checks(num_records: int) -> int:
    return -(-num_records // RECORDS_OF_A_CHECK)


def _read_header(file: BinaryIO, path: Path, rebuild: str) -> np.void:
    """The header, if the file is as long as it says."""
    found = os.fstat(file.fileno()).st_size
    content = file.read(HEADER.itemsize)
    if len(content) < HEADER.itemsize:
        raise DamagedError(f"index {path} is damaged ({found} bytes): {rebuild}")
    header: np.void = np.frombuffer(content, HEADER)[0]
    if header["magic"] != MAGIC or header["version"] != VERSION:
        raise UserError(
            f"index {path} is damaged or of another version (expected version {VERSION}); a run goes on from its "
            f"checkpoint with the one that you make: {rebuild}"
        )
    num_samples, num_images = int(header["num_samples"]), int(header["num_images"])
    expected = HEADER.itemsize + num_samples * SAMPLE.itemsize + num_images * IMAGE.itemsize
    expected += (_num_checks(num_samples) + _num_checks(num_images)) * _CHECK.itemsize
    expected += int(header["shard_list_bytes"])
    if found != expected:
        raise DamagedError(f"index {path} is damaged ({found} bytes, expected {expected}): {rebuild}")
    return header
