"""What one WebDataset tar adds to an index: ``key.jpg`` or ``key.0.jpg key.1.png ...``, and its text.

Every sample that cannot be trained on is left out here, once, with a reason that is counted.
"""

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from itertools import batched
from pathlib import PurePosixPath
from typing import IO, NamedTuple, Protocol

import numpy as np

from navil_megatron.blueprint.image_plan import MAX_ASPECT_RATIO
from navil_megatron.data.content import NoCaptionError, RejectedSample, parse_content
from navil_megatron.data.image_decode import ImageDecodeError, decode_image, read_image_size
from navil_megatron.data.shards.shard_files import open_file
from navil_megatron.data.shards.shard_index import (
    BLOCK,
    IMAGE,
    KIND_CONVERSATION,
    KIND_INTERLEAVED_JSON,
    SAMPLE,
    Shard,
    ShardEntries,
)
from navil_megatron.data.shards.tar_members import kind_of, members_by_key, pictures_of, refuse_compressed, stems_of
from navil_megatron.data.types import Content
from navil_megatron.files.hashes import short_check

MAX_TEXT_BYTES = 2**20  # largest text member that is read; nothing longer fits a row
MAX_IMAGE_BYTES = 2**30
MAX_PIXELS = 2**26  # largest picture, as ``data.max_source_pixels`` has it by default
MAX_IMAGES_OF_A_SAMPLE = 2**16 - 1  # what an index can count
_SAMPLES_AT_ONCE = 1024  # texts that wait for their tokens to be counted together


class TokenCounter(Protocol):
    """What an index asks of a tokenizer."""

    fingerprint: str  # 32 hexadecimal digits that name it

    def count(self, contents: Sequence[Content], num_images: Sequence[int]) -> np.ndarray:
        """[n] int64: tokens of each sample that do not stand for an image."""


class _Sample(NamedTuple):
    """One good sample, its tokens not yet counted."""

    key: str
    text: tarfile.TarInfo
    text_check: int
    kind: int
    images: list[tuple[int, ...]]  # entries of ``IMAGE``
    content: Content
    digest: "hashlib._Hash"  # of its key and bytes

    @property
    def name_blocks(self) -> int:
        return (self.text.offset_data - self.text.offset) // BLOCK


class _Entry(NamedTuple):
    """What an index holds of a sample, but for where its images begin in the table of them."""

    key: str
    place: tuple[int, int]
    tokens: int
    about: tuple[int, int, int]
    images: list[tuple[int, ...]]
    digest: bytes

    @classmethod
    def of(cls, found: _Sample, tokens: int) -> "_Entry":
        place = found.text.offset_data // BLOCK, found.text.size
        about = found.name_blocks, found.kind, found.text_check
        return cls(found.key, place, tokens, about, found.images, found.digest.digest())


def index_shard(shard: str, counter: TokenCounter, *, decode: bool = True, name: str | None = None) -> ShardEntries:
    """Reads one tar, a path or URL, front to back and up to any damage; the index calls it by ``name``.

    Without ``decode`` only headers of pictures are read, and damage shows up during training.

    Raises:
        UserError: the tar cannot be read.
    """
    rejected: list[tuple[str, str]] = []
    entries: list[_Entry] = []
    with open_file(shard) as file:
        num_bytes = file.seek(0, 2)
        file.seek(0)
        refuse_compressed(shard, file)
        groups = _Groups(rejected)
        for batch in batched(_good_samples(file, decode, groups), _SAMPLES_AT_ONCE):
            counts = counter.count([found.content for found in batch], [len(found.images) for found in batch])
            entries += map(_Entry.of, batch, counts.tolist())
    entries = groups.without_torn(entries)
    digest = hashlib.sha256(b"".join(entry.digest for entry in entries))
    first_image = np.cumsum([0, *(len(entry.images) for entry in entries)]).tolist()
    samples = [
        (*entry.place, entry.tokens, first, len(entry.images), *entry.about)
        for entry, first in zip(entries, first_image[:-1], strict=True)
    ]
    images = [image for entry in entries for image in entry.images]
    about = Shard(name or shard, len(samples), num_bytes, digest.hexdigest()[:32])
    return ShardEntries(np.array(samples, dtype=SAMPLE), np.array(images, dtype=IMAGE), about, rejected)


class _Groups:
    """The samples of a tar by their keys: what comes twice, and whose files lie apart."""

    def __init__(self, rejected: list[tuple[str, str]]) -> None:
        self.rejected = rejected
        self._kinds: dict[str, frozenset[str]] = {}
        self._torn: dict[str, None] = {}

    def add(self, key: str, members: Sequence[tarfile.TarInfo]) -> None:
        """Notes what a sample consists of; RejectedSample: it was there before."""
        kinds, known = frozenset(map(kind_of, members)), self._kinds.get(key)
        self._kinds[key] = kinds | (known or frozenset())
        if known is None:
            return
        if not kinds & known:
            self._torn[key] = None
        raise RejectedSample("key occurs again")

    def without_torn(self, entries: "list[_Entry]") -> "list[_Entry]":
        """The entries but those whose other files came later: half of a sample could pass for a whole one."""
        if not self._torn:
            return entries
        self.rejected[:] = [rejection for rejection in self.rejected if rejection[0] not in self._torn]
        self.rejected += [(key, "its files lie apart: make the tar anew with tar --sort=name") for key in self._torn]
        return [entry for entry in entries if entry.key not in self._torn]


def _good_samples(file: IO[bytes], decode: bool, groups: _Groups) -> Iterator[_Sample]:
    for key, members in members_by_key(file, groups.rejected):
        try:
            groups.add(key, members)
            yield _read_sample(file, key, members, decode, groups.rejected)
        except RejectedSample as rejection:
            names = stems_of(members) if isinstance(rejection, _DottedNames) else [key]
            groups.rejected += [(name, str(rejection)) for name in names]


class _DottedNames(RejectedSample):
    """Several samples, as it seems, under one key."""


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


def _read_sample(
    file: IO[bytes], key: str, members: list[tarfile.TarInfo], decode: bool, rejected: list[tuple[str, str]]
) -> _Sample:
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts:
        raise RejectedSample("path climbs out")
    if not all(member.isreg() and not member.issparse() for member in members):
        raise RejectedSample("not a regular file")
    files: dict[str, tarfile.TarInfo] = {}
    for member in members:
        if (other := files.setdefault(kind_of(member), member)) is not member:
            if len(stems_of([member, other])) > 1:
                raise _DottedNames("two files of one kind: names are cut at their first dot")
            raise RejectedSample("two files of one kind")
    images, others = pictures_of(files)
    if len(images) > MAX_IMAGES_OF_A_SAMPLE:
        raise RejectedSample(f"more than {MAX_IMAGES_OF_A_SAMPLE} images")
    text, kind, content, text_bytes = _read_text(file, files, len(images))
    digest = hashlib.sha256(framed(key.encode("utf-8", "surrogateescape")) + framed(text_bytes))
    found = _Sample(key, text, short_check(text_bytes), kind, [], content, digest)
    if found.name_blocks > np.iinfo(np.uint8).max:
        raise RejectedSample("name too long")
    for image in images:
        image_file = _read_member(file, image, MAX_IMAGE_BYTES, "image")
        place = image.offset_data // BLOCK, image.size
        found.images.append((*place, *check_image(image_file, decode), short_check(image_file)))
        digest.update(framed(image_file))
    rejected += [(other.name, "a file beside the pictures, which KEY.0.png, KEY.1.png are") for other in others]
    return found


def framed(content: bytes) -> bytes:
    """Bytes behind their length, so that no two lists of them read the same."""
    return len(content).to_bytes(8, "little") + content


def _read_text(
    file: IO[bytes], files: dict[str, tarfile.TarInfo], num_images: int
) -> tuple[tarfile.TarInfo, int, Content, bytes]:
    """The text member, its kind, content, bytes: JSON that says where images stand, else ``.txt``, else other JSON."""
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
        if found[1] in (KIND_CONVERSATION, KIND_INTERLEAVED_JSON):
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
