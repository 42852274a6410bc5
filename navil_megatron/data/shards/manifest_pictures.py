"""The pictures that lines of a manifest name: files beside it, bytes of a table, or, if that is wanted, URLs."""

import stat
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from navil_megatron.data.content import RejectedSample
from navil_megatron.data.shards.fetch import FetchError, fetch, is_address
from navil_megatron.data.shards.index_build import MAX_IMAGE_BYTES
from navil_megatron.data.shards.manifest_line import Line

_FETCHED_AT_ONCE = 16  # connections of one process
_LINES_AHEAD = 64  # whose pictures are asked for before they are needed

type Images = list[Callable[[], bytes]]
"""Each reads one picture of a line, in order; RejectedSample or NotAllowedError: there is none."""


class NotAllowedError(Exception):
    """A picture that may not be read unless the user says so; the message names it and what to give."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """Where pictures are looked for."""

    folder: Path
    """What paths are relative to."""
    inside: Path | None
    """What they have to lie in, links followed; ``None``: anywhere."""
    fetches: bool
    """URLs are asked."""

    def of[Entry: Line | RejectedSample](
        self, lines: Iterator[tuple[int, Entry]]
    ) -> Iterator[tuple[int, Entry, Images]]:
        """The lines with their pictures; URLs are asked for ahead, several at once."""
        with ThreadPoolExecutor(_FETCHED_AT_ONCE) as pool:
            waiting: deque[tuple[int, Entry, Images]] = deque()
            for number, line in lines:
                images = line.images if isinstance(line, Line) else []
                if not self.fetches or not any(map(is_address, images)):
                    waiting.append((number, line, [partial(self._read, image) for image in images]))
                else:
                    waiting.append((number, line, [pool.submit(self._read, image).result for image in images]))
                if len(waiting) >= (_LINES_AHEAD if self.fetches else 1):
                    yield waiting.popleft()
            yield from waiting

    def _read(self, image: Any) -> bytes:
        """The bytes of a picture, which ``datasets`` has as ``bytes`` or, where it lies beside, as ``path``."""
        if isinstance(image, dict):
            image = image.get("path") if image.get("bytes") is None else image["bytes"]
        if isinstance(image, bytes):
            if len(image) > MAX_IMAGE_BYTES:
                raise RejectedSample(f"image of more than {MAX_IMAGE_BYTES} bytes")
            return image
        return self._fetch(image) if is_address(image) else self._read_file(image)

    def _fetch(self, url: str) -> bytes:
        if not self.fetches:
            raise NotAllowedError(f"{url[:200]}: to ask the network for pictures, give --fetch")
        try:
            return fetch(url)
        except FetchError as error:
            raise RejectedSample(f"image cannot be fetched: {error}") from None

    def _read_file(self, name: Any) -> bytes:
        """The bytes of a file; what is no file, too large, or not inside stays closed."""
        try:
            path = self.folder / name
            if self.inside is not None and not path.resolve().is_relative_to(self.inside):
                raise NotAllowedError(
                    f"{path}, which is not in the manifest's folder: if you trust the manifest with all that you can "
                    "read, give --allow-outside"
                )
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise RejectedSample("image file cannot be read")
            if status.st_size > MAX_IMAGE_BYTES:
                raise RejectedSample(f"image of more than {MAX_IMAGE_BYTES} bytes")
            return path.read_bytes()
        except (OSError, TypeError, ValueError, RuntimeError):  # the last: links in a circle, until Python 3.13
            raise RejectedSample("image file cannot be read") from None
