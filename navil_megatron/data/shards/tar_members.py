"""The members of a WebDataset tar by samples: which belong together, and which of them are pictures.

Members are read in place and never extracted, and a header's claims are checked before memory is spent on them.
"""

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import PurePosixPath
from typing import IO

from navil_megatron.config.errors import UserError
from navil_megatron.data.content import RejectedSample
from navil_megatron.data.shards.shard_index import BLOCK

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif"),
    *("heic", "heif", "jp2", "jxl", "svg"),  # not readable, but without its image a caption is no sample
)
"""Members that are meant to be images; their content decides whether they can be read."""
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"(\xb5/\xfd": ("zstd", "unzstd"),
}
"""First bytes of files that are no tars before they are unpacked, and by what."""
_MAX_HEADER_BYTES = 2**20
_BYTES_AT_ONCE = 2**20


def refuse_compressed(shard: str, file: IO[bytes]) -> None:
    """Says what to do, as a UserError, where a file must be unpacked before it is a tar."""
    start = file.read(8)
    file.seek(0)
    for magic, (name, command) in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"shard {shard} is compressed ({name}), but samples are read at random, each where it lies: unpack it "
                f"first, as with: {command} {shard}"
            )


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


def members_by_key(file: IO[bytes], rejected: list[tuple[str, str]]) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """(key, members) of each sample: neighbours whose names agree up to the first dot.

    A sample that the damage of a tar cuts is lost with it: half of it could pass for a whole one.
    """
    key = ""
    try:
        for key, members in groupby(_visible(file, rejected), lambda member: sample_key(member.name)):
            yield key, list(members)
    except (tarfile.TarError, EOFError, ArithmeticError, ValueError, LookupError, RecursionError):
        rejected.append((key, f"shard is damaged or no uncompressed tar{' from here on' if key else ''}"))


def _visible(file: IO[bytes], rejected: list[tuple[str, str]]) -> Iterator[tarfile.TarInfo]:
    """The members but for folders and hidden files (macOS adds them), of all tars that are joined in the file."""
    place: int | None = 0
    while place is not None:
        file.seek(place)
        with tarfile.open(fileobj=_HeaderReader(file), mode="r:") as tar:  # type: ignore[call-overload]
            if place and tar.firstmember is None:
                rejected.append((f"byte {place}", "what lies behind the end of the tar is no tar"))
                return
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile keeps every header
                if member.size < 0:  # tarfile would go back and for ever in circles
                    raise tarfile.ReadError("forged header")
                if not member.isdir() and not PurePosixPath(member.name).name.startswith("."):
                    yield member
            end = tar.offset
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError("no end mark")
        place = _behind_zeros(file, end + BLOCK)


def _behind_zeros(file: IO[bytes], place: int) -> int | None:
    """The block of the first byte from here on that is not zero."""
    while content := file.read(_BYTES_AT_ONCE):
        if found := len(content) - len(content.lstrip(b"\0")):
            place += found
        if found < len(content):
            return place // BLOCK * BLOCK
    return None


def kind_of(member: tarfile.TarInfo) -> str:
    """``txt``, ``json``, ``image.`` and what names it among others, or another ending."""
    name, _, ending = PurePosixPath(member.name).name.rpartition(".")
    return f"image.{name.partition('.')[2]}" if ending.lower() in IMAGE_EXTENSIONS else ending.lower()


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts img2 before img10; text and numbers take turns, and a number is compared by its length first."""
    pieces = re.split(r"0*([0-9]+)", name)
    return [(len(piece) if place % 2 else 0, piece) for place, piece in enumerate(pieces)]


def pictures_of(files: Mapping[str, tarfile.TarInfo]) -> tuple[list[tarfile.TarInfo], list[tarfile.TarInfo]]:
    """The pictures of a sample in their order, and image files that are none, as a mask ``KEY.seg.png`` is.

    ``KEY.png`` and numbers (``KEY.0.png``); without these numbers behind one name (``KEY.img0.png``), or one file.
    """
    named = {name.partition(".")[2]: member for name, member in files.items() if name.startswith("image")}
    chosen = [name for name in named if not name or name.isdigit()]
    if not chosen and len({name.rstrip("0123456789") for name in named}) == 1:
        chosen = list(named)
    if named and not chosen:
        raise RejectedSample("several pictures without numbers, as KEY.0.png")
    others = [member for name, member in named.items() if name not in chosen]
    return [named[name] for name in sorted(chosen, key=_natural)], others


def stems_of(members: Sequence[tarfile.TarInfo]) -> list[str]:
    """Names without their last endings, each once."""
    return list(dict.fromkeys(member.name.rpartition(".")[0] for member in members))
