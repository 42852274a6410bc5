"""Room on a disk, asked before something large is written."""

import shutil
from pathlib import Path

from navil_megatron.config.errors import UserError


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written under a folder, which need not be there yet."""
    return shutil.disk_usage(_nearest(folder)).free


def _nearest(folder: Path) -> Path:
    """The folder that is there, of this one and those around it."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def require_space(folder: Path, needed: int) -> None:
    """Refuses to write ``needed`` bytes under a folder, which need not be there yet.

    Raises:
        UserError: The disk under the folder has less, or what is mounted there holds no files.
    """
    if not shutil.disk_usage(nearest := _nearest(folder)).total:
        raise UserError(f"{folder} lies in {nearest}, where no files can be; choose a folder on a disk")
    free, disk = free_bytes(folder), folder.absolute().parent
    if free < needed:
        raise UserError(
            f"{disk} has {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB are needed; free some or choose another disk"
        )
