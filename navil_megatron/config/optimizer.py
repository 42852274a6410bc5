"""``[optimizer]``: the update rule and its learning rate."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay and FP32 master weights, and its learning-rate schedule."""

    lr: float
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: int = 200
    """Steps of linear warm-up from zero."""
    min_lr: float = 0.0
    """Floor of the cosine, reached at ``training.train_steps``."""
    weight_decay: float = 0.05
    """Decoupled weight decay; norms, biases, LayerScale and one-dimensional parameters are exempt."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the denominator."""
    clip_grad: float | None = 1.0
    """Largest global gradient norm; ``None``: no clipping."""
    distributed: bool = True
    """Split optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data-parallel ranks bucket by bucket during a step's last backward pass, not after it."""
    overlap_param_gather: bool = False
    """Gather updated weights bucket by bucket during the next forward pass, not after the update. Needs ``distributed``
    and ``overlap_grad_reduce``."""
