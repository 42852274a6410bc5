"""One source: the samples of many shards under one numbering, read at random through its index.

Nothing is opened before it is read. A shard that is not what was indexed is refused, with its name.
"""

import io
import os
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import NoReturn

from navil_megatron.config.data import RemoteConfig
from navil_megatron.config.errors import UserError
from navil_megatron.data.content import RejectedSample, parse_content
from navil_megatron.data.shards.index_build import sample_key
from navil_megatron.data.shards.remote_file import USUAL, RemoteFile
from navil_megatron.data.shards.shard_files import is_url, reaching, resolve_path
from navil_megatron.data.shards.shard_index import BLOCK, KIND_TEXT, SourceIndex
from navil_megatron.data.types import RawSample

MAX_OPEN_FILES = 64  # shards of one source that are kept open
_NEAR_BYTES = 8 * BLOCK  # stretches of a shard that lie no farther apart are read in one go

type Span = tuple[int, int]
"""First byte, and the one after the last."""

_reaching = partial(reaching, missing="restore it", unreadable="restore it or its connection", errors=Exception)
"""Of any type: every remote file system raises types of its own."""


class Source:
    """The samples of one index. Several threads may read."""

    def __init__(self, index: str | Path, remote: RemoteConfig = USUAL) -> None:
        """Opens the index, not the shards; errors as of ``SourceIndex``. ``remote``: of shards behind a URL."""
        self.index, self._remote = SourceIndex(index), remote
        self._files: dict[int, _ShardFile] = {}  # the one used last comes last
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.index)

    def check_shards(self, *, urls: bool = False) -> None:
        """UserError where a shard is not there with the size that was indexed; ``urls``: remote ones are asked too."""
        for number, shard in enumerate(self.index.shards):
            if urls or not is_url(shard.path):
                self._check_size(number, _open_shard(self._path(number), self._remote).num_bytes)

    def shard_of(self, index: int) -> str:
        """Path or URL of the shard that holds a sample."""
        return self._path(self.index.shard_number(index))

    def key(self, index: int) -> str:
        """One sample's name, from the tar's own header; errors as of ``read``."""
        number = self.index.shard_number(index)
        start, text, _ = self._text_place(index)
        (header,) = self._read(number, [(start, text)])
        return self._parse_key(number, header)

    def read(self, index: int, *, images: bool = True) -> RawSample:
        """One sample's bytes, or its text alone; UserError: the shard is gone or not the one that was indexed."""
        number, record = self.index.shard_number(index), self.index.samples[index]
        start, text, end = self._text_place(index)
        pictures = [self._image_place(index, image) for image in range(int(record["num_images"]) if images else 0)]
        header, member, *files = self._read(number, [(start, text), (text, end), *pictures])
        try:
            _, content = parse_content(member, record["kind"] != KIND_TEXT, int(record["num_images"]))
        except RejectedSample:
            self._refuse(number)
        return RawSample(self._path(number), self._parse_key(number, header), tuple(files), content)

    def read_image(self, index: int, number: int) -> bytes:
        """One image file of a sample; errors as of ``read``."""
        (file,) = self._read(self.index.shard_number(index), [self._image_place(index, number)])
        return file

    def _text_place(self, index: int) -> tuple[int, int, int]:
        """Where the header of the text member, its bytes, and what follows them begin."""
        record = self.index.samples[index]
        start = int(record["text_block"]) * BLOCK
        return start - int(record["name_blocks"]) * BLOCK, start, start + int(record["text_bytes"])

    def _image_place(self, index: int, number: int) -> Span:
        record = self.index.samples[index]
        if not 0 <= number < record["num_images"]:
            raise IndexError(f"sample {index} has {record['num_images']} images, not {number + 1}")
        image = self.index.images[int(record["first_image"]) + number]
        start = int(image["block"]) * BLOCK
        return start, start + int(image["bytes"])

    def _path(self, number: int) -> str:
        return resolve_path(self.index.shards[number].path, self.index.path.parent)

    def _parse_key(self, number: int, header: bytes) -> str:
        try:
            if len(header) == BLOCK:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            else:  # an extended header holds the name: tarfile puts it together with the member's own
                with tarfile.open(fileobj=io.BytesIO(header + bytes(2 * BLOCK))) as tar:
                    member = tar.next() or tarfile.TarInfo()
        except (tarfile.TarError, ValueError):
            self._refuse(number)
        return sample_key(member.name)

    def _read(self, number: int, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span of a shard."""
        file = self._open(number)
        found: dict[Span, bytes] = {}
        for group in _neighbours(spans):
            start, end = group[0][0], group[-1][1]
            with _reaching(self._path(number)):
                content = file.read(start, end)
            if len(content) != end - start:
                self._refuse(number)
            found |= {span: content[span[0] - start : span[1] - start] for span in group}
        return [found[span] for span in spans]

    def _open(self, number: int) -> "_ShardFile":
        """The shard, if possible one that is open; one that is let go closes when its last reader is done."""
        with self._lock:
            if (known := self._files.pop(number, None)) is not None:
                self._files[number] = known
                return known
        file = _open_shard(self._path(number), self._remote)
        self._check_size(number, file.num_bytes)
        with self._lock:
            self._files[number] = file
            if len(self._files) > MAX_OPEN_FILES:
                del self._files[next(iter(self._files))]
        return file

    def _check_size(self, number: int, num_bytes: int) -> None:
        expected = self.index.shards[number].num_bytes
        if num_bytes != expected:
            raise UserError(
                f"shard {self._path(number)} was replaced or is damaged: it has {num_bytes} bytes, but had {expected} "
                f"when it was indexed: restore it, or make {self.index.path} anew with: navil-megatron data index"
            )

    def _refuse(self, number: int) -> NoReturn:
        raise UserError(
            f"shard {self._path(number)} is damaged, it does not fit its index: restore it, or make "
            f"{self.index.path} anew with: navil-megatron data index"
        )


class _LocalFile:
    """Reads by position, so that threads share one descriptor; fewer bytes where the file is shorter."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with the object)
        self.num_bytes = os.fstat(self._file.fileno()).st_size

    def read(self, start: int, end: int) -> bytes:
        return os.pread(self._file.fileno(), end - start, start)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


type _ShardFile = _LocalFile | RemoteFile


def _open_shard(path: str, remote: RemoteConfig) -> _ShardFile:
    with _reaching(path):
        return RemoteFile(path, remote) if is_url(path) else _LocalFile(path)


def _neighbours(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans in groups that are worth one read each."""
    groups: list[list[Span]] = []
    for span in sorted(set(spans)):
        if groups and span[0] - groups[-1][-1][1] <= _NEAR_BYTES:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups
