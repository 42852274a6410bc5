"""A run's records at Weights & Biases, if the config names a project.

Only rank 0 sends. Its own process uploads in the background, so a service that is away neither holds a step up nor ends
a run: what could not be sent lies beside ``metrics.jsonl``, for ``wandb sync``.
"""

import importlib.util
import logging
import os
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from navil_megatron.config.errors import UserError
from navil_megatron.config.load import config_to_dict
from navil_megatron.config.logging import LoggingConfig
from navil_megatron.config.run import NaViLConfig

logger = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 60
"""At the start and at the end, where W&B would wait; never more than half of what the other ranks wait."""
ID_FILE = "wandb_run_id"
"""In ``logging.directory``: a run that is started again goes on under the same id."""


def check_wandb(config: LoggingConfig) -> None:
    """Whether the records can be sent; asks nobody over the network.

    Raises:
        UserError: W&B is not installed, or has no key.
    """
    if config.wandb_project is None:
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            f'logging.wandb_project = "{config.wandb_project}" needs wandb, which is not installed: '
            "pip install 'navil_megatron[wandb]', or set wandb_project = \"none\""
        )
    import wandb

    if not _is_offline() and not wandb.login(prompt=False, verify=False):
        raise UserError(
            f'logging.wandb_project = "{config.wandb_project}", but W&B has no API key: run `wandb login`, set '
            "WANDB_API_KEY, or set WANDB_MODE=offline and upload later with `wandb sync`"
        )


class WandbRun:
    """Sends records; after an error of W&B's own, no more of them."""

    def __init__(self, config: NaViLConfig):
        import wandb

        ours = config.logging
        wait = min(MAX_WAIT_SECONDS, config.runtime.collective_timeout_seconds / 2)
        settings = wandb.Settings(silent=True, console="off", init_timeout=wait, finish_timeout=wait)
        init = partial(
            wandb.init,
            project=ours.wandb_project,
            entity=ours.wandb_entity,
            name=ours.wandb_name,
            dir=ours.directory,
            id=_run_id(Path(ours.directory)),
            config=config_to_dict(config),
            settings=settings,
        )
        try:
            # Without a service there is nothing to ask about an earlier part of the run.
            self._run: Any = init(resume=None if _is_offline() else "allow")
        except Exception as error:  # mostly CommError; none of them may end a run
            logger.warning("W&B cannot be reached (%s); records stay here, for `wandb sync`", _in_one_line(error))
            wandb.teardown()  # its process would hold the id of the run that did not start
            self._run = init(mode="offline")
        # A resumed run repeats the steps since its checkpoint, which W&B's own counter would refuse.
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float | int]) -> None:
        """Send one record, which names its step."""
        if self._run is None:
            return
        try:
            self._run.log(dict(values))
        except Exception as error:  # whatever breaks in there must not end a run
            logger.warning("W&B takes no more records (%s); metrics.jsonl does", _in_one_line(error))
            self._run = None

    def finish(self) -> None:
        """Wait until what was sent has arrived, but not for ever."""
        if self._run is not None:
            self._run.finish()


def _is_offline() -> bool:
    return os.environ.get("WANDB_MODE", "online") not in ("online", "run", "shared")


def _run_id(directory: Path) -> str:
    """The run's id, made up once."""
    file = directory / ID_FILE
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:8] + "\n")
    return file.read_text().strip()


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
