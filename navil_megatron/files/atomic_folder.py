"""Folders that appear whole or not at all: written as a ``.partial`` sibling, renamed when complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from navil_megatron.config.errors import WRONG_PATH, UserError
from navil_megatron.files.atomic_file import partial_of
from navil_megatron.files.disk_space import require_space
from navil_megatron.files.file_bytes import flush
from navil_megatron.files.lock import LOCK, owned


@contextmanager
def new_folder(target: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """An empty folder to fill; it becomes ``target`` if the block ends well and vanishes if it does not.

    What a killed process left behind is replaced; a process that still writes is left alone. ``needed_bytes`` will be
    written: it is refused at once where the disk has less.

    Raises:
        UserError: ``target`` exists and is not an empty folder, cannot be written, is being written by another process,
            or the disk is too full.
    """
    require_new(target)
    target = target.absolute()
    partial = partial_of(target)
    with ExitStack() as owning:
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            owning.enter_context(owned(target.with_name(target.name + LOCK), f"{partial}"))
            _remove(partial)
            partial.mkdir()
        except OSError as error:
            if error.errno not in WRONG_PATH:
                raise
            raise UserError(f"{target} cannot be written ({error.strerror}); give another folder") from None
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


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)
