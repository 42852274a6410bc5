"""``[checkpoint]``: state on disk."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Where and when state is saved, and where weights come from."""

    directory: str
    """Folder that holds the run's checkpoints."""
    save_every_steps: int | None = None
    """Steps between saves; ``None``: only at the end and on SIGTERM."""
    keep_last: int = 2
    """Newest checkpoints kept; older ones are deleted after a good save."""
    initial_weights: str | None = None
    """Checkpoint whose weights (and not its data state) start a run that has no checkpoint of its own."""
    initial_optimizer: Literal["fresh", "kept"] = "fresh"
    """Optimizer state of such a start. ``kept``: moments and FP32 weights of ``initial_weights``; parameters that were
    frozen there start with clean moments. Steps, learning rate and data start anew either way."""
