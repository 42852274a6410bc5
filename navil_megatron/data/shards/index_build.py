"""What one WebDataset tar adds to an index: ``key.jpg`` or ``key.0.jpg key.1.png ...``, and its text.

Every sample that cannot be trained on is left out here, once, with a reason that is counted. Members are read in place
and never extracted, and a header's claims are checked before memory is spent on them.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import batched, groupby
from pathlib import PurePosixPath
from typing import IO, NamedTuple, Protocol

import numpy as np

from navil_megatron.blueprint.image_plan import MAX_ASPECT_RATIO
from navil_megatron.data.content import NoCaptionError, RejectedSample, parse_content
from navil_megatron.data.image_decode import ImageDecodeError, decode_image, read_image_size
from navil_megatron.data.shards.shard_files import open_file
from navil_megatron.data.shards.shard_index import BLOCK, IMAGE, KIND_CONVERSATION, SAMPLE, Shard, ShardEntries
from navil_megatron.data.types import Content
from navil_megatron.files.hashes import short_check

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif"),
    *("heic", "heif", "jp2", "jxl", "svg"),  # not readable, but without its image a caption is no sample
)
"""Members that are meant to be images; their content decides whether they can be read."""
MAX_TEXT_BYTES = 2**20  # largest text member that is read; nothing longer fits a row
MAX_IMAGE_BYTES = 2**30
MAX_PIXELS = 2**26  # largest picture, as ``data.max_source_pixels`` has it by default
MAX_IMAGES_OF_A_SAMPLE = 2**16 - 1  # what an index can count
_MAX_HEADER_BYTES = 2**20
_SAMPLES_AT_ONCE = 1024  # texts that wait for their tokens to be counted together


class TokenCounter(Protocol):
    """What an index asks of a tokenizer."""

    fingerprint: str  # 32 hexadecimal digits that name it

    def count(self, contents: Sequence[Content], num_images: Sequence[int]) -> np.ndarray:
        """[n] int64: tokens of each sample that do not stand for an image."""


class _Sample(NamedTuple):
    """One good sample, its tokens not yet counted."""

    text: tarfile.TarInfo
    text_check: int
    kind: int
    images: list[tuple[int, ...]]  # entries of ``IMAGE``
    content: Content

    @property
    def name_blocks(self) -> int:
        return (self.text.offset_data - self.text.offset) // BLOCK


def index_shard(shard: str, counter: TokenCounter, *, decode: bool = True, name: str | None = None) -> ShardEntries:
    """Reads one tar, a path or URL, front to back and up to any damage; the index calls it by ``name``.

    Without ``decode`` only headers of pictures are read, and damage shows up during training.

    Raises:
        UserError: the tar cannot be read.
    """
    samples: list[tuple[int, ...]] = []
    images: list[tuple[int, ...]] = []
    rejected: list[tuple[str, str]] = []
    digest = hashlib.sha256()
    with open_file(shard) as file:
        num_bytes = file.seek(0, 2)
        file.seek(0)
        for batch in batched(_good_samples(file, decode, digest, rejected), _SAMPLES_AT_ONCE):
            counts = counter.count([found.content for found in batch], [len(found.images) for found in batch])
            for found, tokens in zip(batch, counts.tolist(), strict=True):
                place = found.text.offset_data // BLOCK, found.text.size
                about = tokens, len(images), len(found.images), found.name_blocks, found.kind, found.text_check
                samples.append((*place, *about))
                images += found.images
    entry = Shard(name or shard, len(samples), num_bytes, digest.hexdigest()[:32])
    return ShardEntries(np.array(samples, dtype=SAMPLE), np.array(images, dtype=IMAGE), entry, rejected)


def _good_samples(
    file: IO[bytes], decode: bool, digest: "hashlib._Hash", rejected: list[tuple[str, str]]
) -> Iterator[_Sample]:
    seen: set[str] = set()
    for key, members in _members(file, rejected):
        try:
            if key in seen:
                raise RejectedSample("key occurs again")
            seen.add(key)
            yield _read_sample(file, key, members, decode, digest)
        except RejectedSample as rejection:
            rejected.append((key, str(rejection)))


def check_image(file: bytes, decode: bool) -> tuple[int, int]:
    """(height, width) of an image, read whole if ``decode``; RejectedSample: it cannot be trained on."""
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


def _members(file: IO[bytes], rejected: list[tuple[str, str]]) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
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


def _read_sample(
    file: IO[bytes], key: str, members: list[tarfile.TarInfo], decode: bool, digest: "hashlib._Hash"
) -> _Sample:
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
    text, kind, content, text_bytes = _read_text(file, files, len(images))
    found = _Sample(text, short_check(text_bytes), kind, [], content)
    if found.name_blocks > np.iinfo(np.uint8).max:
        raise RejectedSample("name too long")
    own_digest = hashlib.sha256(framed(key.encode("utf-8", "surrogateescape")) + framed(text_bytes))
    for image in images:
        image_file = _read_member(file, image, MAX_IMAGE_BYTES, "image")
        place = image.offset_data // BLOCK, image.size
        found.images.append((*place, *check_image(image_file, decode), short_check(image_file)))
        own_digest.update(framed(image_file))
    digest.update(own_digest.digest())
    return found


def framed(content: bytes) -> bytes:
    """Bytes behind their length, so that no two lists of them read the same."""
    return len(content).to_bytes(8, "little") + content


def _kind(member: tarfile.TarInfo) -> str:
    """``txt``, ``json``, ``image`` and what names it among others, or another ending."""
    name, _, ending = PurePosixPath(member.name).name.rpartition(".")
    return f"image.{name.partition('.')[2]}" if ending.lower() in IMAGE_EXTENSIONS else ending.lower()


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts img2 before img10; text and numbers take turns, and a number is compared by its length first."""
    pieces = re.split(r"0*([0-9]+)", name)
    return [(len(piece) if place % 2 else 0, piece) for place, piece in enumerate(pieces)]


def _read_text(
    file: IO[bytes], files: dict[str, tarfile.TarInfo], num_images: int
) -> tuple[tarfile.TarInfo, int, Content, bytes]:
    """The text member, its kind, content and bytes: a conversation, else the ``.txt``, else a caption in ``.json``."""
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
    return found


def _read_member(file: IO[bytes], member: tarfile.TarInfo, max_bytes: int, what: str) -> bytes:
    if member.size > max_bytes:
        raise RejectedSample(f"{what} of more than {max_bytes} bytes")
    file.seek(member.offset_data)
    content = file.read(member.size)
    if len(content) != member.size:
        raise RejectedSample(f"{what} ends early")
    return content
