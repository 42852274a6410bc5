"""Builds the part of an index that one WebDataset tar fills: ``key.jpg`` or ``key.0.jpg key.1.png ...``, and its text.

Every sample that cannot be trained on is left out here, once, with a reason that is counted. Members are read in place
and never extracted, and a header's claims are checked before memory is spent on them.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import PurePosixPath
from typing import IO, Protocol

import numpy as np

from navil_megatron.blueprint.image_plan import MAX_ASPECT_RATIO
from navil_megatron.data.content import NoCaptionError, RejectedSample, parse_content
from navil_megatron.data.image_decode import ImageDecodeError, decode_image, read_image_size
from navil_megatron.data.shards.shard_files import open_file
from navil_megatron.data.shards.shard_index import BLOCK, IMAGE, KIND_CONVERSATION, SAMPLE, Shard
from navil_megatron.data.types import Content

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif"),
    *("heic", "heif", "jp2", "jxl", "svg"),  # not readable, but without its image a caption is no sample
)
"""Members that are meant to be images; their content decides whether they can be read."""
MAX_TEXT_BYTES = 2**20
"""Largest text member that is read; nothing longer fits a row."""
MAX_IMAGE_BYTES = 2**30
"""Largest image file that is read."""
MAX_PIXELS = 2**26
"""Largest picture, as ``data.max_source_pixels`` has it by default."""
MAX_IMAGES_OF_A_SAMPLE = 2**16 - 1
"""What an index can count."""
_MAX_HEADER_BYTES = 2**20
_SAMPLES_AT_ONCE = 1024
"""Texts that wait for their tokens to be counted together."""


class TokenCounter(Protocol):
    """What an index asks of a tokenizer."""

    fingerprint: str
    """32 hexadecimal digits that name it."""

    def count(self, contents: Sequence[Content], num_images: Sequence[int]) -> np.ndarray:
        """[n] int64: tokens of each sample that do not stand for an image."""


@dataclass(slots=True)
class ShardPart:
    """What one tar adds to an index."""

    samples: np.ndarray
    """[n] of ``SAMPLE``."""
    images: np.ndarray
    """[m] of ``IMAGE``."""
    shard: Shard
    rejected: list[tuple[str, str]]
    """(key, reason) of every sample that was left out."""


@dataclass(slots=True)
class _Tables:
    """The part as it grows."""

    counter: TokenCounter
    samples: list[tuple[int, ...]] = field(default_factory=list)
    images: list[tuple[int, ...]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    waiting: list[tuple[Content, int]] = field(default_factory=list)

    def add(self, sample: tuple[int, ...], images: list[tuple[int, ...]], content: Content) -> None:
        """One good sample."""
        self.samples.append(sample)
        self.images += images
        self.waiting.append((content, len(images)))
        if len(self.waiting) == _SAMPLES_AT_ONCE:
            self.count()

    def count(self) -> None:
        """Counts the tokens of the texts that wait."""
        if self.waiting:
            contents, num_images = zip(*self.waiting, strict=True)
            self.tokens += self.counter.count(contents, num_images).tolist()
            self.waiting = []


def index_shard(shard: str, counter: TokenCounter, *, decode: bool = True, name: str | None = None) -> ShardPart:
    """Reads one tar from front to back; a tar that is damaged counts up to the damage.

    Args:
        shard: path or URL of the tar.
        counter: counts tokens.
        decode: decode every picture in full; without it only headers are read, and damage shows up during training.
        name: how the index calls the shard.

    Raises:
        UserError: the tar cannot be read.
    """
    tables, content = _Tables(counter), hashlib.sha256()
    rejected: list[tuple[str, str]] = []
    with open_file(shard) as file:
        num_bytes = file.seek(0, 2)
        file.seek(0)
        seen: set[str] = set()
        for key, files in _members(file, rejected):
            try:
                if key in seen:
                    raise RejectedSample("key occurs again")
                seen.add(key)
                tables.add(*_index_sample(file, key, files, len(tables.images), decode, content))
            except RejectedSample as rejection:
                rejected.append((key, str(rejection)))
    tables.count()
    samples = np.array(tables.samples, dtype=SAMPLE)
    samples["text_tokens"] = tables.tokens
    row = Shard(name or shard, len(samples), num_bytes, content.hexdigest()[:32])
    return ShardPart(samples, np.array(tables.images, dtype=IMAGE), row, rejected)


def check_image(file: bytes, decode: bool) -> tuple[int, int]:
    """(height, width) of an image that can be trained on; ``decode`` reads all of it instead of the header.

    Raises:
        RejectedSample: it cannot be.
    """
    try:
        height, width = read_image_size(file, MAX_PIXELS)
        if decode:
            decode_image(file, MAX_PIXELS)
    except ImageDecodeError as error:
        raise RejectedSample(f"image: {error}") from None
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise RejectedSample(f"image: aspect ratio beyond {MAX_ASPECT_RATIO}")
    if max(height, width) > np.iinfo(np.uint16).max:
        raise RejectedSample("image: a side of more than 65535 pixels")
    return height, width


def sample_key(name: str) -> str:
    """A member's name, folder included, up to the first dot of the file name."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.split(".", 1)[0])) if path.name else name


class _HeaderReader:
    """A file as ``tarfile`` may read it: headers alone, so that a forged size costs no memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.tell = file.tell
        self.seek = file.seek

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError("forged header")
        return self._file.read(count)


type _Group = tuple[str, list[tarfile.TarInfo]]


def _members(file: IO[bytes], rejected: list[tuple[str, str]]) -> Iterator[_Group]:
    """(key, members) of each sample: neighbours whose names agree up to the first dot.

    A sample that the damage of a tar cuts is lost with it: half of it could pass for a whole one.
    """
    key = ""
    try:
        with tarfile.open(fileobj=_HeaderReader(file), mode="r:") as tar:  # type: ignore[call-overload]
            for key, members in groupby(_visible(tar, file), lambda member: sample_key(member.name)):
                yield key, list(members)
    except (tarfile.TarError, EOFError, ArithmeticError, ValueError, LookupError, RecursionError):
        rejected.append((key, f"shard is damaged or no uncompressed tar{' from here on' if key else ''}"))


def _visible(tar: tarfile.TarFile, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The members of a tar but for folders and hidden files (macOS adds them)."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header
        if member.size < 0:  # tarfile would go back and for ever in circles
            raise tarfile.ReadError("forged header")
        if not member.isdir() and not PurePosixPath(member.name).name.startswith("."):
            yield member
    file.seek(tar.offset)
    if file.read(BLOCK) != bytes(BLOCK):  # tarfile takes a damaged header for the end
        raise tarfile.ReadError("no end mark")


def _index_sample(
    file: IO[bytes], key: str, members: list[tarfile.TarInfo], first_image: int, decode: bool, digest: "hashlib._Hash"
) -> tuple[tuple[int, ...], list[tuple[int, ...]], Content]:
    """Its record with tokens still 0, the records of its images, and its content."""
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts:
        raise RejectedSample("path climbs out")
    if not all(member.isreg() and not member.issparse() for member in members):
        raise RejectedSample("not a regular file")
    files: dict[str, tarfile.TarInfo] = {}
    for member in members:
        if files.setdefault(_kind(member), member) is not member:
            raise RejectedSample("two files of one kind")
    images = [files[name] for name in sorted(files, key=_natural) if name.startswith("image")]
    if len(images) > MAX_IMAGES_OF_A_SAMPLE:
        raise RejectedSample(f"more than {MAX_IMAGES_OF_A_SAMPLE} images")
    text, kind, text_bytes, content = _read_text(file, files, len(images))
    name_blocks = (text.offset_data - text.offset) // BLOCK
    if name_blocks > np.iinfo(np.uint8).max:
        raise RejectedSample("name too long")
    own_digest = hashlib.sha256(_framed(key.encode("utf-8", "surrogateescape")) + _framed(text_bytes))
    records: list[tuple[int, ...]] = []
    for image in images:
        image_file = _read_member(file, image, MAX_IMAGE_BYTES, "image")
        records.append((image.offset_data // BLOCK, image.size, *check_image(image_file, decode)))
        own_digest.update(_framed(image_file))
    digest.update(own_digest.digest())
    record = (text.offset_data // BLOCK, text.size, 0, first_image, len(images), name_blocks, kind)
    return record, records, content


def _framed(part: bytes) -> bytes:
    """Bytes behind their length, so that no two rows of parts read the same."""
    return len(part).to_bytes(8, "little") + part


def _kind(member: tarfile.TarInfo) -> str:
    """``txt``, ``json``, ``image`` and what names it among others, or another ending."""
    name, _, ending = PurePosixPath(member.name).name.rpartition(".")
    ending = ending.lower()
    if ending not in IMAGE_EXTENSIONS:
        return ending
    return f"image.{name.partition('.')[2]}"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts img2 before img10; text and numbers take turns, and a number is compared by its length first."""
    parts = re.split(r"0*([0-9]+)", name)
    return [(len(part) if place % 2 else 0, part) for place, part in enumerate(parts)]


def _read_text(
    file: IO[bytes], files: dict[str, tarfile.TarInfo], num_images: int
) -> tuple[tarfile.TarInfo, int, bytes, Content]:
    """The text member, its kind, bytes and content: a conversation, else the ``.txt``, else a caption in ``.json``."""
    found = None
    for ending in ("json", "txt"):
        if (member := files.get(ending)) is None:
            continue
        text = _read_member(file, member, MAX_TEXT_BYTES, "text")
        try:
            found = (member, *parse_content(text, ending == "json", num_images), text)
        except NoCaptionError:  # img2dataset's .json beside the .txt may lack one
            if ending == "txt" or "txt" not in files:
                raise
            continue
        if found[1] == KIND_CONVERSATION:
            break
    if found is None:
        raise RejectedSample("no text file")
    member, kind, content, text = found
    return member, kind, text, content


def _read_member(file: IO[bytes], member: tarfile.TarInfo, max_bytes: int, what: str) -> bytes:
    """The bytes of a member, if there are not too many."""
    if member.size > max_bytes:
        raise RejectedSample(f"{what} of more than {max_bytes} bytes")
    file.seek(member.offset_data)
    content = file.read(member.size)
    if len(content) != member.size:
        raise RejectedSample(f"{what} ends early")
    return content
