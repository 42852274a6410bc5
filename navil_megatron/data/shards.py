"""WebDataset tar shards: written once by ``ShardWriter``, read sample by sample at random by ``ShardSet``.

Plain tars (what img2dataset writes) with our own index beside each: the global, stateless plan of the data order needs
random access and nothing else from a streaming layer.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import numpy as np
import webdataset

from navil_megatron.config.errors import UserError
from navil_megatron.data.index_build import (
    IndexReport,
    RejectedSample,
    TokenCounter,
    index_shard,
    parse_caption,
    sample_key,
)
from navil_megatron.data.shard_index import load_index
from navil_megatron.data.types import RawSample


class ShardWriter:
    """Writes samples into ``<prefix>-000000.tar``, ``<prefix>-000001.tar``, ... and indexes each as it is finished.

    The same samples give the same bytes. A shard appears under its name only when it is complete.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        *,
        samples_per_shard: int = 10_000,
        decode: bool = True,
        tokens: TokenCounter | None = None,
    ) -> None:
        """Prepares to write into a folder, which is made; ``decode`` and ``tokens`` as in ``index_shard``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.report = IndexReport()
        self.shards: list[Path] = []
        self._folder, self._prefix = folder, prefix
        self._samples_per_shard = samples_per_shard
        self._decode, self._tokens = decode, tokens
        self._num_written = 0
        self._tar: webdataset.TarWriter | None = None
        self._file: io.BufferedWriter | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None and self._file is not None:  # a shard cut short must not be found by a glob
            self._tar.close()
            self._file.close()
            self._partial.unlink()

    def write(self, key: str, caption: str, image: bytes | None = None, extension: str = "jpg") -> None:
        """Adds one sample; without an image it is one of text alone."""
        if self._tar is None:
            self._file = open(self._partial, "wb")  # noqa: SIM115 (closed with the shard)
            self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0)
        sample = {"__key__": key, "txt": caption.encode()}
        if image is not None:
            sample[extension] = image
        self._tar.write(sample)
        self._num_written += 1
        if self._num_written % self._samples_per_shard == 0:
            self._finish_shard()

    def close(self) -> None:
        """Finishes the last shard."""
        if self._tar is not None:
            self._finish_shard()

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._prefix}-{len(self.shards):06d}.tar"

    @property
    def _partial(self) -> Path:
        return Path(f"{self._path}.partial")

    def _finish_shard(self) -> None:
        assert self._tar is not None and self._file is not None
        self._tar.close()
        self._file.close()
        self._tar = self._file = None
        os.replace(self._partial, self._path)
        index_shard(self._path, self.report, decode=self._decode, tokens=self._tokens)
        self.shards.append(self._path)


class ShardSet:
    """The samples of many shards under one numbering: shards in the order given, samples in the order of the tar."""

    def __init__(self, shards: Sequence[str]) -> None:
        """Opens the indexes, not the tars.

        Raises:
            UserError: a shard or its index is missing or damaged.
        """
        headers, records = zip(*(load_index(shard) for shard in shards), strict=True)
        self.shards = tuple(str(shard) for shard in shards)
        self._headers = headers
        self._starts = np.cumsum([0, *(len(table) for table in records)])
        self.records = np.concatenate(records)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def fingerprint(self) -> str:
        """Names the samples and their order: the shards' file names and contents, wherever they lie."""
        digest = hashlib.sha256()
        for shard, header in zip(self.shards, self._headers, strict=True):
            digest.update(f"{os.path.basename(shard)}\0{int(header['num_samples'])}\0".encode())
            digest.update(header["content"].tobytes())
        return digest.hexdigest()[:32]

    def caption_tokens(self, tokens: TokenCounter) -> np.ndarray:
        """[n] int64: caption lengths under a tokenizer, from the indexes that were built with it, else counted now."""
        lengths = []
        for number, header in enumerate(self._headers):
            first, end = self._starts[number], self._starts[number + 1]
            if header["tokenizer"].tobytes() == tokens.fingerprint:
                lengths.append(self.records["caption_tokens"][first:end].astype(np.int64))
            elif end > first:
                lengths.append(np.asarray(tokens.count([self.caption(i) for i in range(first, end)]), dtype=np.int64))
        return np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)

    def shard_of(self, index: int) -> str:
        """The shard that holds a sample."""
        return self.shards[int(np.searchsorted(self._starts, index, side="right")) - 1]

    def caption(self, index: int) -> str:
        """One sample's caption."""
        shard, record = self.shard_of(index), self.records[index]
        with self._open(shard) as file:
            return self._read_caption(file, shard, record)

    def key(self, index: int) -> str:
        """One sample's name, from the tar's own header."""
        shard = self.shard_of(index)
        with self._open(shard) as file:
            return self._read_key(file, shard, self.records[index])

    def read(self, index: int) -> RawSample:
        """One sample's bytes.

        Raises:
            UserError: the shard is gone or shorter than its index says.
        """
        shard, record = self.shard_of(index), self.records[index]
        with self._open(shard) as file:
            caption = self._read_caption(file, shard, record)
            images: tuple[bytes, ...] = ()
            if record["image_bytes"]:
                images = (self._read(file, shard, int(record["image_offset"]), int(record["image_bytes"])),)
            key = self._read_key(file, shard, record)
        return RawSample(shard=shard, key=key, images=images, caption=caption)

    def _open(self, shard: str) -> io.BufferedReader:
        try:
            return open(shard, "rb")
        except OSError as error:
            raise UserError(f"shard {shard} can no longer be opened ({error.strerror}): restore it") from None

    def _read(self, file: io.BufferedReader, shard: str, offset: int, count: int) -> bytes:
        file.seek(offset)
        content = file.read(count)
        if len(content) != count:
            raise _damaged(shard)
        return content

    def _read_key(self, file: io.BufferedReader, shard: str, record: np.void) -> str:
        name_bytes = int(record["name_bytes"])
        offset = int(record["image_offset"] if record["image_bytes"] else record["text_offset"])
        header = self._read(file, shard, offset - name_bytes, name_bytes)
        try:
            if name_bytes == tarfile.BLOCKSIZE:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            else:  # an extended header holds the name: tarfile puts it together with the member's own
                with tarfile.open(fileobj=io.BytesIO(header + bytes(2 * tarfile.BLOCKSIZE))) as tar:
                    member = tar.next() or tarfile.TarInfo()
        except tarfile.TarError:
            raise _damaged(shard) from None
        return sample_key(member)

    def _read_caption(self, file: io.BufferedReader, shard: str, record: np.void) -> str:
        text = self._read(file, shard, int(record["text_offset"]), int(record["text_bytes"]))
        try:
            return parse_caption(text, bool(record["text_is_json"]))
        except RejectedSample:
            raise _damaged(shard) from None


def expand_shards(patterns: Sequence[str], what: str) -> list[str]:
    """The shards behind glob patterns: patterns in order, the files of each sorted by name.

    Args:
        patterns: globs or plain paths.
        what: the config field they come from, for the message.

    Raises:
        UserError: a pattern matches nothing, or two match the same shard.
    """
    shards: list[str] = []
    for pattern in patterns:
        found = sorted(glob(pattern, recursive=True))
        if not found:
            raise UserError(f"{what}: no shard matches {pattern!r}: check the path, or build shards first")
        shards += found
    twice = sorted({shard for shard in shards if shards.count(shard) > 1}) if len(set(shards)) < len(shards) else []
    if twice:
        raise UserError(f"{what}: shard {twice[0]} is matched twice: make the patterns disjoint")
    return shards


def _damaged(shard: str) -> UserError:
    return UserError(
        f"shard {shard} is damaged, it does not fit its index: restore it, or index it anew with: "
        f"navil-megatron data index {shard}"
    )
