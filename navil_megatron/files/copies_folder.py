"""What a node's folder of copies looks like, for ``checkpoint/local_copies.py``.

::

    local_directory/RUN/step_00000120.after_00000100.CONFIG.LIFE/rank_00003

is what rank 3 held after step 120. The name says what it may be restored into: this run, config and world, while
checkpoint 100 is there. Ranks that were started anew write under another LIFE, so that no copy mixes two histories.
"""

import re
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from navil_megatron.config.errors import UserError
from navil_megatron.files.atomic_file import new_file
from navil_megatron.files.file_bytes import read_into

RUN_FILE = "run_id"
"""In ``checkpoint.directory``: names the run that it belongs to."""
_COPY = re.compile(r"step_(\d+)\.after_(\d+)\.(\w+)\.\w+")
_FILE = re.compile(r"rank_(\d+)")


def run_id(checkpoints: Path) -> str:
    """The name of a run, made when it is first asked for; it lies with the run's checkpoints.

    Raises:
        UserError: It cannot be written, or is none.
    """
    path = checkpoints / RUN_FILE
    try:
        if not path.exists():
            checkpoints.mkdir(parents=True, exist_ok=True)
            with new_file(path) as file:
                file.write(uuid.uuid4().hex.encode())
        name = path.read_bytes().decode(errors="replace")
    except OSError as error:
        raise UserError(f"checkpoint.directory cannot be used ({error}); mend that, or give another one") from None
    if not re.fullmatch("[0-9a-f]{32}", name):
        raise UserError(f"{path} holds no 32 hexadecimal digits; remove it: copies made so far are not taken then")
    return name


@dataclass(frozen=True, slots=True)
class CopiesFolder:
    """Copies of one run with one config on one node."""

    path: Path
    config: str
    """Names config and world."""

    def make(self) -> None:
        """Makes the folder.

        Raises:
            UserError: It cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"checkpoint.local_directory cannot be used ({error}); mend that, or give another"
            ) from None

    def name(self, step: int, checkpoint: int, life: str) -> str:
        """Of a copy made by ranks of one life after a step, when the newest checkpoint was of another; in order."""
        return f"step_{step:08d}.after_{checkpoint:08d}.{self.config}.{life}"

    def file(self, copy: str, rank: int) -> Path:
        """Where a rank's part lies."""
        return self.path / copy / f"rank_{rank:05d}"

    def parts(self, checkpoint: int) -> set[tuple[str, int]]:
        """Copies that may follow the checkpoint of a step (0: none): newer, and not made after one that is gone now.

        Each with a rank whose part lies here.
        """
        found = set()
        for path in self.path.glob("step_*/rank_*"):
            copy, file = _COPY.fullmatch(path.parent.name), _FILE.fullmatch(path.name)
            if copy and file and copy[3] == self.config and int(copy[2]) <= checkpoint < int(copy[1]):
                found.add((path.parent.name, int(file[1])))
        return found

    def read(self, copy: str, rank: int) -> memoryview:
        """A rank's part; nothing where it cannot be read."""
        path = self.file(copy, rank)
        try:
            content = memoryview(bytearray(path.stat().st_size))
            read_into(path, 0, content, is_last=False)
        except (OSError, ValueError):
            return memoryview(b"")
        return content

    def write(self, copy: str, rank: int, content: memoryview) -> None:
        """A rank's part, whole or not at all."""
        path = self.file(copy, rank)
        path.parent.mkdir(exist_ok=True)
        with new_file(path) as file:
            file.write(content)

    def remove(self, copy: str, ranks: Iterable[int]) -> None:
        """Removes damaged parts.

        Raises:
            UserError: One cannot be removed.
        """
        try:
            for rank in ranks:
                self.file(copy, rank).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"a damaged copy cannot be removed ({error}); remove it to go on") from None

    def keep(self, *copies: str | None) -> None:
        """Removes all other copies of the run; the folder, too, where none is kept."""
        for path in self.path.glob("step_*"):
            if path.name not in copies:
                shutil.rmtree(path, ignore_errors=True)
        if not any(copies):
            shutil.rmtree(self.path, ignore_errors=True)
