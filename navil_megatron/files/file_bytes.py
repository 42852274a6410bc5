"""Bytes of files much larger than memory: nothing is mapped, and nothing is left in the page cache.

A conversion touches every byte once. Left alone, the system would keep all of them, push out what other programs need,
and spend more time on finding memory for them than the disk needs to read and write them.
"""

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

_WORTH_DROPPING = 1 << 20
_LAG = 1 << 25


def read_into(path: Path, position: int, target: memoryview, is_last: bool = True) -> None:
    """Fills ``target`` from a place in a file; ``is_last``: nobody on this machine will read it again soon.

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
        if is_last and len(target) >= _WORTH_DROPPING:
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


def write_at(descriptor: int, position: int, source: memoryview) -> None:
    """Writes all of ``source`` at a place of an open file."""
    done = 0
    while done < len(source):
        done += os.pwrite(descriptor, source[done:], position + done)


@contextmanager
def write_behind() -> Iterator[Callable[[int, int], None]]:
    """Brings what was written to the disk while more is written, and lets go of it.

    Yields:
        What to tell that so many bytes were written to an open file; it waits if the disk is far behind. The disk's
        errors show there or at the end.
    """
    waiting: dict[int, int] = {}
    flushing: Future[None] | None = None

    def wrote(descriptor: int, num_bytes: int) -> None:
        nonlocal flushing
        waiting[descriptor] = waiting.get(descriptor, 0) + num_bytes
        if sum(waiting.values()) >= _LAG:
            if flushing is not None:
                flushing.result()
            flushing = thread.submit(_flush_all, list(waiting))
            waiting.clear()

    with ThreadPoolExecutor(1) as thread:
        yield wrote
        if flushing is not None:
            flushing.result()


def _flush_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class FileWindow(io.RawIOBase):
    """A stretch of a file as a small file of its own; refuses to hand out much at once."""

    LARGEST_READ = 1 << 20

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._path, self._start, self._length, self._position = path, start, length, 0

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
