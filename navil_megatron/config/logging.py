"""``[logging]``: records."""

from dataclasses import dataclass

from navil_megatron.config.numbers import Count
from navil_megatron.config.paths import LocalPath


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingConfig:
    """What a run leaves behind besides checkpoints."""

    directory: LocalPath
    """Folder for ``metrics.jsonl``, TensorBoard files and failed-sample lists."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    progress: bool = True
    """Tell of records on rank 0: a bar on a terminal, a line each where there is none (``> log``, Slurm, kubectl)."""
    feature_scale_every_steps: Count | None = None
    """Steps between measurements of the decoder's hidden states, text and visual apart, layer by layer; ``None``: none.
    They are written with the next record (``training.log_every_steps``)."""
    wandb_project: str | None = None
    """Weights & Biases project that rank 0 sends the records to; ``None``: none. Where the service is away or
    ``WANDB_MODE`` is ``offline``, they stay in ``directory`` for ``wandb sync``."""
    wandb_entity: str | None = None
    """Its user or team; ``None``: that of the API key, or ``WANDB_ENTITY``."""
    wandb_name: str | None = None
    """The run's name there; ``None``: W&B finds one, or ``WANDB_NAME``."""
