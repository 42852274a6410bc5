"""Bytes of files much larger than memory: nothing is mapped, and nothing is left in the page cache.

A conversion touches every byte once. Left alone, the system would keep all of them, push out what other programs need,
and spend more time on finding memory for them than the disk needs to read and write them.
"""

import io
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

_WORTH_DROPPING = 1 << 20
_LAG = 1 << 25


def read_into(path: Path, position: int, target: memoryview) -> None:
    """Fills ``target`` from a place in a file.

    Raises:
        ValueError: The file ends before.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < len(target):
            count = os.preadv(descriptor, [target[done:]], position + done)
            if count == 0:
                raise ValueError(f"{path.name} ends {len(target) - done} bytes early")
            done += count
        if len(target) >= _WORTH_DROPPING:
            os.posix_fadvise(descriptor, position, len(target), os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Waits until a file or folder is on disk; who reads it next, reads the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


class WriteBehind:
    """Brings what was written to the disk while more is written, and lets go of it."""

    def __init__(self, stack: ExitStack) -> None:
        """Ends with ``stack``."""
        self._thread = stack.enter_context(ThreadPoolExecutor(1))
        self._waiting: dict[int, int] = {}
        self._flushing: Future[None] | None = None

    def wrote(self, descriptor: int, num_bytes: int) -> None:
        """Notes that bytes were written to an open file; waits if the disk is far behind."""
        self._waiting[descriptor] = self._waiting.get(descriptor, 0) + num_bytes
        if sum(self._waiting.values()) >= _LAG:
            self.catch_up()
            self._flushing = self._thread.submit(_flush_all, list(self._waiting))
            self._waiting.clear()

    def catch_up(self) -> None:
        """Waits for what was being flushed; the disk's errors show here."""
        if self._flushing is not None:
            self._flushing.result()


def _flush_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class OpenFiles:
    """Files of a folder that exist, written at any place; each is opened once."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        """Closes them with ``stack``."""
        self._folder = folder
        self._descriptors: dict[str, int] = {}
        self._closing = stack.enter_context(ExitStack())
        self._behind = WriteBehind(stack)
        self.catch_up = self._behind.catch_up

    def write(self, name: str, position: int, source: memoryview) -> None:
        """Writes all of ``source`` at a place of a file."""
        if name not in self._descriptors:
            descriptor = os.open(self._folder / name, os.O_WRONLY)
            self._closing.callback(os.close, descriptor)
            self._descriptors[name] = descriptor
        done = 0
        while done < len(source):
            done += os.pwrite(self._descriptors[name], source[done:], position + done)
        self._behind.wrote(self._descriptors[name], len(source))


@contextmanager
def open_files(folder: Path) -> Iterator[OpenFiles]:
    """``OpenFiles`` of a folder, closed at the end."""
    with ExitStack() as stack:
        files = OpenFiles(folder, stack)
        yield files
        files.catch_up()


class FileWindow(io.RawIOBase):
    """A stretch of a file as a small file of its own; refuses to hand out much at once."""

    LARGEST_READ = 1 << 20

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._path, self._start, self._length, self._position = path, start, length, 0

    def seekable(self) -> bool:
        """It is."""
        return True

    def readable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Bytes from the start of the window."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a place of the window."""
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if place < 0:
            raise ValueError("a place before the start of the window")
        self._position = place
        return place

    def read(self, size: int | None = -1) -> bytes:
        """Up to so many bytes; fewer at the end of the window."""
        left = max(self._length - self._position, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > self.LARGEST_READ:
            raise ValueError(f"asks for {wanted} bytes of what should be a small record")
        content = bytearray(wanted)
        read_into(self._path, self._start + self._position, memoryview(content))
        self._position += wanted
        return bytes(content)
