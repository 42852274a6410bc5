"""The smallest and largest value of each number in the config, as data."""

from functools import reduce
from typing import Any, NamedTuple

from navil_megatron.config.model import ModelConfig
from navil_megatron.config.run import NaViLConfig


class Range(NamedTuple):
    """Where a number may lie."""

    low: float
    """Smallest value, or the limit that ``above`` keeps out."""
    high: float = float("inf")
    """Largest value, or the limit that ``below`` keeps out."""
    above: bool = False
    """``low`` itself is refused."""
    below: bool = False
    """``high`` itself is refused."""

    def holds(self, value: float) -> bool:
        """Whether the value lies in the range; NaN and infinity never do."""
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below or self.high == float("inf") else value <= self.high
        return over and under

    def __str__(self) -> str:
        """As an error message says it: ``at least 1``, ``more than 0 and at most 1``."""
        low = f"{'more than' if self.above else 'at least'} {self.low:g}"
        if self.high == float("inf"):
            return low
        return f"{low} and {'less than' if self.below else 'at most'} {self.high:g}"


COUNT = Range(1)
FROM_ZERO = Range(0)
POSITIVE = Range(0, above=True)
DECAY = Range(0, 1, below=True)

RANGES: dict[str, Range] = {
    "model.language.num_layers": COUNT,
    "model.language.hidden_size": COUNT,
    "model.language.ffn_hidden_size": COUNT,
    "model.language.num_attention_heads": COUNT,
    "model.language.num_query_groups": COUNT,
    "model.language.head_dim": COUNT,
    "model.language.vocab_size": COUNT,
    "model.language.num_experts": COUNT,
    "model.language.experts_per_token": COUNT,
    "model.language.rope_theta": POSITIVE,
    "model.language.rope_scaling_factor": Range(1),
    "model.language.rope_low_freq_factor": POSITIVE,
    "model.language.rope_high_freq_factor": POSITIVE,
    "model.language.rope_original_length": COUNT,
    "model.language.norm_epsilon": POSITIVE,
    "model.language.max_position_embeddings": COUNT,
    "model.language.init_std": FROM_ZERO,
    "model.vision.num_layers": FROM_ZERO,
    "model.vision.hidden_size": COUNT,
    "model.vision.ffn_hidden_size": COUNT,
    "model.vision.num_attention_heads": COUNT,
    "model.vision.patch_size": COUNT,
    "model.vision.merge_size": COUNT,
    "model.vision.norm_epsilon": POSITIVE,
    "model.vision.layer_scale_init": FROM_ZERO,
    "model.vision.rope_theta": POSITIVE,
    "model.vision.window_size": COUNT,
    "model.vision.init_std": FROM_ZERO,
    "model.connector_norm_epsilon": POSITIVE,
    "data.seq_length": COUNT,
    "data.min_image_pixels": COUNT,
    "data.max_image_pixels": COUNT,
    "data.max_source_pixels": COUNT,
    "data.scale_ratio": Range(0, 1, above=True, below=True),
    "data.num_workers": COUNT,
    "data.prefetch_steps": COUNT,
    "data.max_failed_share": Range(0, 1),
    "data.pad_segments_to": COUNT,
    "training.train_steps": COUNT,
    "training.global_batch_size": COUNT,
    "training.micro_batch_size": COUNT,
    "training.seed": Range(0, 2**31, below=True),
    "training.loss_chunk_tokens": COUNT,
    "evaluation.every_steps": COUNT,
    "training.log_every_steps": COUNT,
    "training.router_aux_loss": FROM_ZERO,
    "training.router_z_loss": FROM_ZERO,
    "optimizer.lr": POSITIVE,
    "optimizer.warmup_steps": FROM_ZERO,
    "optimizer.min_lr": FROM_ZERO,
    "optimizer.weight_decay": FROM_ZERO,
    "optimizer.beta1": DECAY,
    "optimizer.beta2": DECAY,
    "optimizer.epsilon": POSITIVE,
    "optimizer.clip_grad": POSITIVE,
    "checkpoint.save_every_steps": COUNT,
    "checkpoint.keep_last": COUNT,
    "runtime.collective_timeout_seconds": COUNT,
    "runtime.cpu_threads": COUNT,
    "logging.feature_scale_every_steps": COUNT,
    "parallel.tensor_model_parallel_size": COUNT,
    "parallel.pipeline_model_parallel_size": COUNT,
    "parallel.virtual_pipeline_model_parallel_size": Range(2),
    "parallel.expert_model_parallel_size": COUNT,
    "parallel.expert_tensor_parallel_size": COUNT,
    "parallel.context_parallel_size": COUNT,
}
"""Dotted setting -> range. Every setting that holds a number has a row; a setting that is off (``None``) passes."""


def check_ranges(config: NaViLConfig) -> list[str]:
    """One line for every number outside its range."""
    return _outside(config, "")


def check_model_ranges(model: ModelConfig) -> list[str]:
    """The same for a model section by itself."""
    return _outside(model, "model.")


def _outside(section: Any, prefix: str) -> list[str]:
    problems = []
    for key, allowed in RANGES.items():
        if key.startswith(prefix):
            value: Any = reduce(getattr, key.removeprefix(prefix).split("."), section)
            if value is not None and not allowed.holds(value):
                problems.append(f"{key} = {value}: expected {allowed}")
    return problems
