"""Writes tar shards: the same samples give the same bytes, and a shard has its name only once it is complete."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import webdataset

from navil_megatron.data.content import dump_content
from navil_megatron.data.image_decode import ImageDecodeError, open_image
from navil_megatron.data.shards.index_build import MAX_PIXELS, TokenCounter
from navil_megatron.data.shards.index_shards import index_shards
from navil_megatron.data.types import Content
from navil_megatron.files.atomic_file import new_file


@contextmanager
def write_tar(path: Path) -> Iterator[webdataset.TarWriter]:
    """A tar to write into; without an error it is moved to its name, on the disk for good."""
    with new_file(path) as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        yield tar


def tar_sample(key: str, extension: str, text: bytes, images: Sequence[bytes]) -> dict[str, Any]:
    """A sample as ``TarWriter`` takes it; images are stored as they are, numbered where there are several."""
    endings = [image_extension(image) for image in images]
    if len(images) > 1:
        endings = [f"{number}.{ending}" for number, ending in enumerate(endings)]
    return {"__key__": key, extension: text, **dict(zip(endings, images, strict=True))}


def image_extension(file: bytes) -> str:
    """The file name ending that fits the content, whatever the file was called."""
    try:
        kind = (open_image(file, MAX_PIXELS).format or "").lower()
    except ImageDecodeError:
        return "jpg"
    return {"jpeg": "jpg", "mpo": "jpg"}.get(kind, kind)


class ShardWriter:
    """Writes samples into ``<prefix>-000000.tar`` and so on, and at the end the index over them."""

    def __init__(
        self, folder: Path, prefix: str, counter: TokenCounter, *, samples_per_shard: int = 10_000, decode: bool = True
    ) -> None:
        """Prepares to write into a folder, which is made; ``counter`` and ``decode`` as of ``index_shards``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.index = folder / f"{prefix}.index"
        self.shards: list[Path] = []  # the tars that are finished
        self.report: dict[str, Any] = {}  # what was indexed and what was left out, once the writer is closed
        self._counter, self._decode = counter, decode
        self._samples_per_shard = samples_per_shard
        self._num_written = 0
        self._open = ExitStack()
        self._tar: webdataset.TarWriter | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self.close()
        else:
            self._open.__exit__(*error)

    def write(self, key: str, content: Content, images: Sequence[bytes] = ()) -> None:
        """Adds one sample."""
        if self._tar is None:
            path = self.index.with_name(f"{self.index.stem}-{len(self.shards):06d}.tar")
            self._tar = self._open.enter_context(write_tar(path))
            self.shards.append(path)
        self._tar.write(tar_sample(key, *dump_content(content), images))
        self._num_written += 1
        if self._num_written % self._samples_per_shard == 0:
            self._finish_shard()

    def close(self) -> None:
        """Finishes the last shard and indexes all."""
        self._finish_shard()
        shards = [str(shard) for shard in self.shards]
        self.report = index_shards(shards, self.index, self._counter, decode=self._decode)

    def _finish_shard(self) -> None:
        self._open.close()
        self._tar = None
