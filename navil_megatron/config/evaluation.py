"""``[evaluation]``: the loss on held-out samples, during a run."""

from collections.abc import Iterator
from dataclasses import dataclass

from navil_megatron.config.numbers import Count
from navil_megatron.config.paths import LocalPath
from navil_megatron.config.training import TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """On what, and how often, a run measures its loss without learning from it."""

    sources: tuple[LocalPath, ...] = ()
    """Index files of held-out sources; empty: no evaluation."""
    every_steps: Count | None = None
    """Steps between evaluations, and one at the end; ``None``: at the end alone."""
    swapped_images: bool = False
    """Evaluate a second time with each sample showing another one's picture: the loss must rise if images are read."""


def evaluation_rules(evaluation: EvaluationConfig, training: TrainingConfig) -> Iterator[str]:
    """One line for every rule about held-out samples that the run breaks."""
    if training.generate_every_steps is not None and not evaluation.sources:
        yield (
            f"training.generate_every_steps = {training.generate_every_steps}, but evaluation.sources is empty; name "
            'held-out shards or set it to "none"'
        )
    if evaluation.every_steps is not None and not evaluation.sources:
        yield (
            f"evaluation.every_steps = {evaluation.every_steps}, but evaluation.sources is empty; name held-out "
            'shards or set every_steps = "none"'
        )
