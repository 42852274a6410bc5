"""Files that appear whole or not at all: written as a ``.partial`` sibling, renamed when they are on the disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from navil_megatron.files.file_bytes import flush

PARTIAL = ".partial"
"""Ends the name of what is not complete."""


def partial_of(path: Path) -> Path:
    """Where a file or folder is written until it is complete."""
    return path.with_name(path.name + PARTIAL)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into; it replaces ``path`` if the block ends well and vanishes if it does not.

    A reader sees the old file or the new one, also after a loss of power.
    """
    partial = partial_of(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        flush(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def append(path: Path, content: bytes) -> None:
    """Adds to a file, which is made if needed; on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
