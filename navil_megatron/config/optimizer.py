"""``[optimizer]``: the update rule and its learning rate."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from navil_megatron.config.numbers import CountFromZero, NotNegative, Positive, Range


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay and FP32 master weights, and its learning-rate schedule."""

    lr: Positive
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: CountFromZero = 200
    """Steps of linear warm-up from zero."""
    min_lr: NotNegative = 0.0
    """Floor of the cosine, reached at ``training.train_steps``."""
    weight_decay: NotNegative = 0.05
    """Decoupled weight decay; norms, biases, LayerScale and one-dimensional parameters are exempt."""
    beta1: Annotated[float, Range(0, 1, below=True)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Range(0, 1, below=True)] = 0.95
    """Decay of the second moment."""
    epsilon: Positive = 1e-8
    """Added to the denominator."""
    clip_grad: Positive | None = 1.0
    """Largest global gradient norm; ``None``: no clipping."""
    distributed: bool = True
    """Split optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data-parallel ranks bucket by bucket during a step's last backward pass, not after it."""
    overlap_param_gather: bool = False
    """Gather updated weights bucket by bucket during the next forward pass, not after the update. Needs ``distributed``
    and ``overlap_grad_reduce``."""


def optimizer_rules(optimizer: OptimizerConfig, train_steps: int) -> Iterator[str]:
    """One line for every rule about the schedule and the overlap that the run breaks."""
    if optimizer.warmup_steps > train_steps:
        yield (
            f"optimizer.warmup_steps = {optimizer.warmup_steps} is more than training.train_steps = "
            f"{train_steps}; the peak would never be reached: shorten the warm-up"
        )
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr = {optimizer.min_lr} is more than optimizer.lr = {optimizer.lr}; lower the floor"
    for needed in ("distributed", "overlap_grad_reduce"):
        if optimizer.overlap_param_gather and not getattr(optimizer, needed):
            yield (
                f"optimizer.overlap_param_gather = true needs optimizer.{needed} = true; switch it on, or switch "
                "overlap_param_gather off"
            )
