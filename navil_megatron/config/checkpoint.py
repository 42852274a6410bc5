"""``[checkpoint]``: state on disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from navil_megatron.config.numbers import Count
from navil_megatron.config.paths import LocalPath


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Where and when state is saved, and where weights come from."""

    directory: LocalPath
    """Folder that holds the run's checkpoints."""
    save_every_steps: Count | None = None
    """Steps between saves; ``None``: only at the end and on SIGTERM."""
    keep_last: Count = 2
    """Newest checkpoints kept; older ones are deleted after a good save."""
    async_save: bool = False
    """Train on while a checkpoint is written: a step waits only until its state is copied to host memory, once. The
    save at the end and on SIGTERM is waited for."""
    local_directory: str | None = None
    """Folder on a disk of each node, under the same path on all, for copies of the state between saves: each rank's own
    and that of a rank on the next node. A start takes the newest that is complete and newer than the checkpoints."""
    local_every_steps: Count | None = None
    """Steps between such copies."""
    fall_back: bool = False
    """Where the newest checkpoint is damaged, go on from the newest whole one, with a warning, and do the steps since
    then again; ``false``: end with a line that names what is damaged."""
    initial_weights: LocalPath | None = None
    """Checkpoint whose weights (and not its data state) start a run that has no checkpoint of its own."""
    initial_optimizer: Literal["fresh", "kept"] = "fresh"
    """Optimizer state of such a start. ``kept``: moments and FP32 weights of ``initial_weights``; parameters that were
    frozen there start with clean moments. Steps, learning rate and data start anew either way."""


def checkpoint_rules(checkpoint: CheckpointConfig) -> Iterator[str]:
    """One line for every rule that the section breaks."""
    if (checkpoint.local_directory is None) != (checkpoint.local_every_steps is None):
        yield (
            "checkpoint.local_directory says where copies between saves go, and checkpoint.local_every_steps how often "
            "they are made; set both or neither"
        )
    if checkpoint.local_directory == checkpoint.directory:
        yield (
            f"checkpoint.local_directory = {checkpoint.local_directory!r} is checkpoint.directory, too; give a folder "
            "on a disk of the node"
        )
    if checkpoint.initial_optimizer == "kept" and checkpoint.initial_weights is None:
        yield (
            'checkpoint.initial_optimizer = "kept", but checkpoint.initial_weights names no checkpoint to keep it '
            'from; name one or set initial_optimizer = "fresh"'
        )
