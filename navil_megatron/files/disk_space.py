"""Room on a disk, asked before something large is written."""

import shutil
from pathlib import Path

from navil_megatron.config.errors import UserError


def require_space(folder: Path, needed: int) -> None:
    """Refuses to start what cannot end.

    Args:
        folder: Where something will be written; it need not be there yet.
        needed: Bytes.

    Raises:
        UserError: The disk under the folder has less.
    """
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{folder.parent} has {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB are needed; free some or choose "
            "another disk"
        )
