"""The learning rate as a pure function of the step, so a resumed run needs no scheduler state.

Paper, table 7: linear warm-up, then constant; the cosine is for the later stages of the recipe.
"""

import math

from navil_megatron.config.optimizer import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, train_steps: int) -> float:
    """The rate of an update, counted from 1: the peak is reached at ``warmup_steps``, ``min_lr`` at ``train_steps``."""
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    decay_steps = max(1, train_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decay_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
