"""Which run a folder of records belongs to: an id, made up once, that its checkpoints and records carry."""

import json
import uuid
from pathlib import Path

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.runtime.session import Session

FILE = "run.json"
"""In ``logging.directory``."""


def settle_run_id(config: NaViLConfig, session: Session, stored: str) -> str:
    """The run's id, the same on every rank; ``stored`` is that of its checkpoint, empty without one.

    Raises:
        UserError: ``logging.directory`` holds the records of another run.
    """
    found = [session.together(lambda: _settle(config, stored) if session.is_main else "")]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def _settle(config: NaViLConfig, stored: str) -> str:
    folder, checkpoints = Path(config.logging.directory), str(Path(config.checkpoint.directory).resolve())
    file = folder / FILE
    known = _read(file)
    # A run that ended before its first save has no checkpoint to be known by: its folder of them tells.
    is_own = known.get("id") == stored if stored else known.get("checkpoints") == checkpoints
    if known and not is_own:
        raise UserError(
            f"logging.directory {folder} holds the records of another run ({known.get('id')}, with checkpoints in "
            f"{known.get('checkpoints')}); give this run a folder of its own, or move those records away"
        )
    run_id: str = stored or known.get("id") or uuid.uuid4().hex[:8]
    if not known:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"id": run_id, "checkpoints": checkpoints}) + "\n")
    return run_id


def _read(file: Path) -> dict[str, str]:
    """What the file says; nothing where there is none."""
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"{file} is damaged, expected the id of the run in this folder; delete it if the run is this one"
        )
    return found
