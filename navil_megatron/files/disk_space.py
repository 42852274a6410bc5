"""Room on a disk, asked before something large is written."""

import shutil
from pathlib import Path

from navil_megatron.config.errors import UserError


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written under a folder, which need not be there yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free


def require_space(folder: Path, needed: int) -> None:
    """Refuses to write ``needed`` bytes under a folder, which need not be there yet.

    Raises:
        UserError: The disk under the folder has less.
    """
    free, disk = free_bytes(folder), folder.absolute().parent
    if free < needed:
        raise UserError(
            f"{disk} has {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB are needed; free some or choose another disk"
        )
