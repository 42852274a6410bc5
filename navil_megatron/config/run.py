"""A whole run: one section a field, each in the file of its name."""

from dataclasses import dataclass, field

from navil_megatron.config.checkpoint import CheckpointConfig
from navil_megatron.config.data import DataConfig
from navil_megatron.config.evaluation import EvaluationConfig
from navil_megatron.config.logging import LoggingConfig
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.optimizer import OptimizerConfig
from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.config.precision import PrecisionConfig, padding_of_segments
from navil_megatron.config.runtime import RuntimeConfig
from navil_megatron.config.training import TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class NaViLConfig:
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    runtime: RuntimeConfig
    logging: LoggingConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def pad_segments_to(self) -> int:
        """Each modality's segment of a row is padded to a multiple of this many tokens."""
        return padding_of_segments(self.precision, self.data, self.parallel)

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of one microbatch: its rows laid end to end."""
        return self.training.micro_batch_size * self.data.seq_length

    @property
    def rank_tokens(self) -> int:
        """Tokens of one microbatch on a context-parallel rank."""
        return self.microbatch_tokens // self.parallel.context_parallel_size
