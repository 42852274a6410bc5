"""Folders that appear whole or not at all: written as a ``.partial`` sibling, renamed when complete."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from navil_megatron.config.errors import UserError
from navil_megatron.files.atomic_file import partial_of
from navil_megatron.files.disk_space import require_space
from navil_megatron.files.file_bytes import flush


@contextmanager
def new_folder(target: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """An empty folder to fill; it becomes ``target`` if the block ends well and vanishes if it does not.

    What a killed process left behind is replaced; a process that still writes is left alone. ``needed_bytes`` will be
    written: it is refused at once where the disk has less.

    Raises:
        UserError: ``target`` exists and is not an empty folder, another process is writing it, or the disk is too full.
    """
    require_new(target)
    target = target.absolute()
    partial = partial_of(target)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with _held(partial):
        _empty(partial)
        try:
            require_space(partial, needed_bytes)
            yield partial
            commit_folder(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def require_new(target: Path) -> None:
    """Refuses a target that holds something.

    Raises:
        UserError: It does.
    """
    is_empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    if os.path.lexists(target) and not is_empty:
        raise UserError(f"{target} exists already; give a new folder, or delete it first")


def commit_folder(partial: Path, target: Path) -> None:
    """Makes sure that every file is on disk, then gives the folder its good name.

    Raises:
        UserError: Something else has that name by now.
    """
    flush_folder(partial)
    require_new(target)
    partial.rename(target)
    flush(target.parent)


def flush_folder(folder: Path) -> None:
    """Waits until all files of a folder are on disk, so that a rename never overtakes the content."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Makes the folder and locks it; the lock ends with this process, however that ends."""
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"{folder} is being written by another process; wait for it, or stop it") from None
        # The other process may have renamed or removed it between the two calls: then this lock is of no use.
        if folder.exists() and os.path.samestat(folder.stat(), os.fstat(descriptor)):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
