"""One source: the samples of many shards under one numbering, read at random through its index.

Nothing is opened before it is read. A shard that is not what was indexed is refused, with its name.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import NoReturn

from navil_megatron.config.data import RemoteConfig
from navil_megatron.config.errors import DamagedError, UserError
from navil_megatron.data.content import RejectedSample, parse_content
from navil_megatron.data.shards.index_build import framed
from navil_megatron.data.shards.remote_file import USUAL, RemoteFile
from navil_megatron.data.shards.shard_files import is_url, reaching, resolve_path
from navil_megatron.data.shards.shard_index import BLOCK, KIND_INTERLEAVED_TEXT, KIND_JSON, KIND_TEXT, SourceIndex
from navil_megatron.data.shards.tar_members import sample_key
from navil_megatron.data.types import Content, RawSample
from navil_megatron.files.hashes import short_check

MAX_OPEN_FILES = 64  # shards of one source that are kept open
_NEAR_BYTES = 8 * BLOCK  # stretches of a shard that lie no farther apart are read in one go

type Span = tuple[int, int]
"""First byte, and the one after the last."""

_reaching = partial(reaching, missing="restore it", unreadable="restore it or its connection", errors=Exception)
"""Of any type: every remote file system raises types of its own."""


class DamagedSampleError(DamagedError):
    """One sample is not what was indexed; its neighbours may be."""


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
        return self._parse_key(index, header)

    def read(self, index: int, *, images: bool = True) -> RawSample:
        """One sample's bytes, or its text alone; UserError: the shard is gone or not the one that was indexed."""
        number, record = self.index.shard_number(index), self.index.samples[index]
        start, text, end = self._text_place(index)
        pictures = [self._image_place(index, image) for image in range(int(record["num_images"]) if images else 0)]
        header, member, *files = self._read(number, [(start, text), (text, end), *pictures])
        for image, file in enumerate(files):
            self._require_same(index, file, image)
        content = self._parse_content(index, member)
        return RawSample(self._path(number), self._parse_key(index, header), tuple(files), content)

    def read_content(self, index: int) -> Content:
        """What one sample says; DamagedSampleError: not what was indexed; other errors as of ``read``."""
        return self._parse_content(index, self._read_text(index))

    def read_image(self, index: int, number: int) -> bytes:
        """One image file of a sample; DamagedSampleError: not what was indexed; other errors as of ``read``."""
        (file,) = self._read(self.index.shard_number(index), [self._image_place(index, number)])
        self._require_same(index, file, number)
        return file

    def check_shard(self, number: int) -> None:
        """Reads all samples of a shard.

        Raises:
            DamagedError: They are not what was indexed; the first one that differs is named.
        """
        digest = hashlib.sha256()
        for index in range(int(self.index.starts[number]), int(self.index.starts[number + 1])):
            text = self._read_text(index)
            self._parse_content(index, text)
            own_digest = hashlib.sha256(framed(self.key(index).encode("utf-8", "surrogateescape")) + framed(text))
            for image in range(int(self.index.samples[index]["num_images"])):
                own_digest.update(framed(self.read_image(index, image)))
            digest.update(own_digest.digest())
        if digest.hexdigest()[:32] != self.index.shards[number].content:
            self._refuse(number)

    def _text_place(self, index: int) -> tuple[int, int, int]:
        """Where the header of the text member, its bytes, and what follows them begin."""
        record = self.index.samples[index]
        start = int(record["text_block"]) * BLOCK
        return start - int(record["name_blocks"]) * BLOCK, start, start + int(record["text_bytes"])

    def _image_place(self, index: int, number: int) -> Span:
        record = self.index.samples[index]
        if not 0 <= number < record["num_images"]:
            raise IndexError(f"sample {index} has {record['num_images']} images, not {number + 1}")
        image = self.index.images_of(index)[number]
        start = int(image["block"]) * BLOCK
        return start, start + int(image["bytes"])

    def _read_text(self, index: int) -> bytes:
        _, text, end = self._text_place(index)
        (member,) = self._read(self.index.shard_number(index), [(text, end)])
        return member

    def _parse_content(self, index: int, member: bytes) -> Content:
        record = self.index.samples[index]
        self._require_same(index, member)
        try:
            is_json = record["kind"] not in (KIND_TEXT, KIND_INTERLEAVED_TEXT)
            has_marks = record["kind"] not in (KIND_TEXT, KIND_JSON)
            return parse_content(member, is_json, int(record["num_images"]), has_marks=has_marks)[1]
        except RejectedSample:
            self._refuse(self.index.shard_number(index), f"the text of sample {index}")

    def _require_same(self, index: int, content: bytes, image: int | None = None) -> None:
        """Compares the text of a sample, or one of its images, with the hash that the index has of it."""
        record = self.index.samples[index] if image is None else self.index.images_of(index)[image]
        if short_check(content) != record["check"]:
            what = "the text" if image is None else f"image {image}"
            self._refuse(self.index.shard_number(index), f"{what} of sample {index}")

    def _path(self, number: int) -> str:
        return resolve_path(self.index.shards[number].path, self.index.path.parent)

    def _parse_key(self, index: int, header: bytes) -> str:
        try:
            if len(header) == BLOCK:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            else:  # an extended header holds the name: tarfile puts it together with the member's own
                with tarfile.open(fileobj=io.BytesIO(header + bytes(2 * BLOCK))) as tar:
                    member = tar.next() or tarfile.TarInfo()
        except (tarfile.TarError, ValueError):
            self._refuse(self.index.shard_number(index), f"the header of sample {index}")
        return sample_key(member.name)

    def _read(self, number: int, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span of a shard."""
        if max(end for _, end in spans) > self.index.shards[number].num_bytes:
            raise self.index.damaged(f"it refers to bytes that {self._path(number)} does not have")
        file = self._open(number)
        found: dict[Span, bytes] = {}
        for group in _neighbours(spans):
            start, end = group[0][0], group[-1][1]
            with _reaching(self._path(number)):
                content = file.read(start, end)
            if len(content) != end - start:
                self._refuse(number, "it ends early", DamagedError)
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

    def _refuse(self, number: int, what: str = "", kind: type[DamagedError] = DamagedSampleError) -> NoReturn:
        raise kind(
            f"shard {self._path(number)} is damaged, it does not fit its index{what and f' ({what})'}: restore it, or "
            f"make {self.index.path} anew with: navil-megatron data index"
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
