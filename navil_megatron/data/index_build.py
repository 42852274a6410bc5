"""Builds the index of one WebDataset tar, as img2dataset writes them (key.jpg|png|webp + key.txt or key.json).

Every sample that cannot be trained on is left out here, once, with a name and a reason that is counted. Members are
read in place and never extracted, so path names that climb out and links are harmless.
"""

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath

import numpy as np

from navil_megatron.config.errors import UserError
from navil_megatron.data.image_decode import ImageDecodeError, decode_image, read_image_size
from navil_megatron.data.image_plan import MAX_ASPECT_RATIO
from navil_megatron.data.shard_index import NOT_COUNTED, RECORD, save_index

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif")
MAX_TEXT_BYTES = 2**20
"""Largest caption file that is read; nothing longer fits a row."""
MAX_IMAGE_BYTES = 2**30
"""Largest image file that is read."""
MAX_NAME_BYTES = 2**16 - 1
"""Largest tar header in front of a member; extended headers hold long names."""


class RejectedSample(Exception):
    """A sample that does not enter the index; the message is the reason, short enough to count by."""


@dataclass(slots=True)
class IndexReport:
    """What building indexes found."""

    num_samples: int = 0
    """Samples that entered an index."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rejected samples by reason."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """(where, reason) of every rejected sample."""

    def reject(self, where: str, reason: str) -> None:
        """Counts and names one rejected sample."""
        self.reasons[reason] += 1
        self.rejected.append((where, reason))


@dataclass(frozen=True, slots=True)
class TokenCounter:
    """Caption lengths under one tokenizer."""

    count: Callable[[Sequence[str]], np.ndarray]
    """Captions -> tokens of each."""
    fingerprint: bytes
    """16 bytes that name the tokenizer."""


def parse_caption(text: bytes, is_json: bool) -> str:
    """The caption in a ``.txt`` or ``.json`` member, without white space around it.

    Raises:
        RejectedSample: not UTF-8, not JSON, no caption, or an empty one.
    """
    try:
        caption = text.decode("utf-8")
    except UnicodeDecodeError:
        raise RejectedSample("text is not UTF-8") from None
    if is_json:
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            raise RejectedSample("text is not JSON") from None
        found = fields.get("caption") if isinstance(fields, dict) else None
        if not isinstance(found, str):
            raise RejectedSample("JSON without a caption")
        caption = found
    if not caption.strip():
        raise RejectedSample("empty caption")
    return caption.strip()


def check_image(file: bytes, decode: bool) -> tuple[int, int]:
    """(height, width) of an image that can be trained on; ``decode`` reads all of it instead of the header.

    Raises:
        RejectedSample: it cannot be.
    """
    try:
        height, width = read_image_size(file)
        if decode:
            decode_image(file)
    except ImageDecodeError as error:
        raise RejectedSample(f"image: {error}") from None
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise RejectedSample(f"image: aspect ratio beyond {MAX_ASPECT_RATIO}")
    return height, width


def index_shard(
    shard: Path, report: IndexReport, *, decode: bool = True, tokens: TokenCounter | None = None
) -> np.ndarray:
    """Reads one tar, writes its index beside it, and gives the records; bad samples are left out and reported.

    Args:
        shard: the tar.
        report: gets the counts.
        decode: decode every picture in full; without it only headers are read, and damage shows up during training.
        tokens: fills in caption lengths; without it they are counted whenever the shard is opened.

    Raises:
        UserError: the tar itself is missing or damaged.
    """
    records, captions = [], []
    content = hashlib.sha256()
    for key, members in _samples(shard, report):
        try:
            record, caption, files = _index_sample(shard, members, decode)
        except RejectedSample as rejection:
            report.reject(f"{shard}: {key}", str(rejection))
            continue
        records.append(record)
        captions.append(caption)
        for part in (key.encode("utf-8", "surrogateescape"), *files):
            content.update(len(part).to_bytes(8, "little") + part)
    table = np.array(records, dtype=RECORD)
    if tokens is not None and captions:
        table["caption_tokens"] = tokens.count(captions)
    save_index(shard, table, content.digest()[:16], tokens.fingerprint if tokens is not None else NOT_COUNTED)
    report.num_samples += len(table)
    return table


def _samples(shard: Path, report: IndexReport) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """(key, members) of each sample: neighbours in the tar whose names agree up to the first dot."""
    seen: set[str] = set()
    for key, members in groupby(_regular_members(shard, report), sample_key):
        if key in seen:
            report.reject(f"{shard}: {key}", "key occurs again")
            continue
        seen.add(key)
        yield key, list(members)


def sample_key(member: tarfile.TarInfo) -> str:
    """The member's name, folder included, up to the first dot of the file name."""
    path = PurePosixPath(member.name)
    return str(path.with_name(path.name.split(".", 1)[0]))


def _regular_members(shard: Path, report: IndexReport) -> Iterator[tarfile.TarInfo]:
    """The files of a tar, in order; folders and hidden files (macOS adds them) are passed over."""
    try:
        with tarfile.open(shard, mode="r:") as tar:
            for member in tar:
                if member.isdir() or PurePosixPath(member.name).name.startswith("."):
                    continue
                if not PurePosixPath(member.name).name:
                    report.reject(f"{shard}: {member.name}", "no name")
                elif not member.isreg() or member.issparse():
                    report.reject(f"{shard}: {member.name}", "not a regular file")
                else:
                    yield member
    except FileNotFoundError:
        raise UserError(f"shard {shard} is missing: check the path") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"shard {shard} is not a whole, uncompressed tar ({error}): restore it") from None


def _index_sample(
    shard: Path, members: list[tarfile.TarInfo], decode: bool
) -> tuple[tuple[int, ...], str, tuple[bytes, ...]]:
    """One record with caption tokens still 0, the caption, and the bytes of its files."""
    extensions = {member.name.rsplit(".", 1)[-1].lower(): member for member in members}
    if len(extensions) < len(members):
        raise RejectedSample("two files of one kind")
    images = [extensions[kind] for kind in IMAGE_EXTENSIONS if kind in extensions]
    if len(images) > 1:
        raise RejectedSample("more than one image")
    text = extensions.get("txt", extensions.get("json"))  # img2dataset writes both, with the same caption
    if text is None:
        raise RejectedSample("no caption file")
    is_json = "txt" not in extensions
    text_file = _read_member(shard, text, MAX_TEXT_BYTES, "text")
    caption = parse_caption(text_file, is_json)
    named = images[0] if images else text
    name_bytes = named.offset_data - named.offset
    if name_bytes > MAX_NAME_BYTES:
        raise RejectedSample("name too long")
    if not images:
        return (0, text.offset_data, 0, text.size, 0, 0, 0, name_bytes, is_json, 0), caption, (text_file,)
    image = images[0]
    image_file = _read_member(shard, image, MAX_IMAGE_BYTES, "image")
    height, width = check_image(image_file, decode)
    offsets = (image.offset_data, text.offset_data, image.size, text.size)
    return (*offsets, height, width, 0, name_bytes, is_json, 0), caption, (text_file, image_file)


def _read_member(shard: Path, member: tarfile.TarInfo, max_bytes: int, what: str) -> bytes:
    """The bytes of a member, if there are not too many."""
    if member.size > max_bytes:
        raise RejectedSample(f"{what} of more than {max_bytes} bytes")
    with open(shard, "rb") as file:
        file.seek(member.offset_data)
        return file.read(member.size)
