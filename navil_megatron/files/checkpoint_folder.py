"""What a folder of checkpoints looks like, for whoever writes or reads one.

::

    run/step_00000100/            a complete checkpoint; ``.partial`` behind its name: one that is being written,
                                  ``.damaged``: one that a run with ``checkpoint.fall_back`` went past
        navil_config.json         the resolved config, or what is known of it: its model and data sections
        .metadata                 torch's table of tensors: size, type, and which bytes of which file hold them
        metadata.json             megatron-core's name of the format
        __0_0.distcp ...          the bytes
        checksums.json            hashes of the tensors, if a conversion wrote them
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from navil_megatron.config.errors import DamagedError, UserError
from navil_megatron.files.json_file import read_json

CONFIG_FILE = "navil_config.json"
METADATA_FILE = ".metadata"
FORMAT_FILE = "metadata.json"
OPTIMIZER_PREFIX = "optimizer."
"""Keys of tensors that are optimizer state."""
STEP_PREFIX = "step_"
DAMAGED = ".damaged"
"""Behind the name of a checkpoint that was set aside."""


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies; names sort as steps do."""
    return run / f"{STEP_PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """The step that a folder's name tells."""
    digits = checkpoint.name.removeprefix(STEP_PREFIX)
    return int(digits) if checkpoint.name.startswith(STEP_PREFIX) and digits.isdigit() else None


def complete_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run's folder, oldest first."""
    found = run.iterdir() if run.is_dir() else ()
    return sorted(path for path in found if step_of(path) is not None and path.is_dir())


def find_checkpoint(path: Path, remedy: str = "give the path of one") -> Path:
    """A checkpoint folder itself, or the newest complete one in a run's folder.

    Raises:
        UserError: There is none; ``remedy`` says what to do.
    """
    if (path / CONFIG_FILE).is_file():
        return path
    if not (complete := complete_checkpoints(path)):
        raise UserError(
            f"{path} holds no checkpoint: expected {CONFIG_FILE} in it, or {STEP_PREFIX}* folders; {remedy}"
        )
    return complete[-1]


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is meant to be a checkpoint or a run's folder of them, complete or not."""
    return any((path / name).is_file() for name in (CONFIG_FILE, METADATA_FILE)) or any(path.glob(f"{STEP_PREFIX}*"))


@contextmanager
def still_there(checkpoint: Path) -> Iterator[None]:
    """Around reading a checkpoint: what a run deletes meanwhile is said to be deleted, and not to be damaged."""
    try:
        yield
    except (UserError, FileNotFoundError):
        if checkpoint.is_dir():
            raise
        raise UserError(
            f"checkpoint {checkpoint} was deleted while it was read, as a run deletes those beyond "
            "checkpoint.keep_last: run the same again with the newest one, or give the run a larger keep_last"
        ) from None


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The config of a checkpoint as plain values.

    Raises:
        DamagedError: The file is missing, or is not JSON with a model section.
    """
    path = checkpoint / CONFIG_FILE
    with still_there(checkpoint):
        try:
            config = read_json(path, "the checkpoint is damaged; copy it again, or move it away to use an older one")
        except UserError as error:
            raise DamagedError(str(error)) from None
    if not isinstance(config.get("model"), dict):
        raise DamagedError(f"{path} has no model section: expected the config that the checkpoint was saved with")
    if not isinstance(config.get("data") or {}, dict):
        raise DamagedError(f"{path} has a data section that is no table: expected the config of the checkpoint")
    return config


def write_config(checkpoint: Path, config: Mapping[str, Any]) -> None:
    """Leaves a config, or its model and data sections, in a checkpoint; complete it is then."""
    # In ASCII: a path in it need not be Unicode.
    (checkpoint / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
