"""``[parallel]``: the layout over ranks."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """The layout: how one model and one batch are laid over the ranks. Data parallelism takes what is left."""

    tensor_model_parallel_size: int = 1
    """Ranks that split each matrix."""
    pipeline_model_parallel_size: int = 1
    """Stages that split the decoder's depth; the first also holds encoder and connector."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks a stage holds under the interleaved schedule; ``None``: plain 1F1B."""
    pipeline_layers: tuple[int, ...] | None = None
    """Decoder layers of each stage, first to last; ``None``: even."""
    expert_model_parallel_size: int = 1
    """Ranks that share out the FFN experts of both modalities, out of the data-parallel ones. 2 with one expert per
    modality: text expert on one, visual on the other; half of their memory each, but work as uneven as the tokens."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that split each matrix of such an expert; ``None``: as many as ``tensor_model_parallel_size``."""
    context_parallel_size: int = 1
    """Ranks that split a row's tokens, where it is too long for one. Divides key/value heads / tensor-parallel size."""
    sequence_parallel: bool = False
    """Split activations outside the matrices over the tensor-parallel ranks too."""

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that split each matrix of an expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold one set of experts."""
        return self.expert_tensor_size * self.pipeline_model_parallel_size * self.expert_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.pipeline_model_parallel_size * self.row_ranks

    @property
    def row_ranks(self) -> int:
        """Ranks of a pipeline stage that share its rows."""
        return self.tensor_model_parallel_size * self.context_parallel_size
