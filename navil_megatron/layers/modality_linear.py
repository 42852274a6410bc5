"""Linear layers that hold one weight per modality and split it over the tensor-parallel ranks.

Rows arrive modality-major, so each modality is one GEMM on a contiguous view. The collectives are those of
megatron-core's own column and row parallel layers and run once for both modalities, whatever the microbatch holds: a
modality without rows leaves a zero gradient, never none, and no rank waits for another.
"""

from functools import partial
from typing import ClassVar

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import divide
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from navil_megatron.layers.kernels import Kernels
from navil_megatron.layers.modality import NaViLPackedSeqParams


class ModalityLinear(MegatronModule):
    """What the two parallel kinds share: a matrix per modality, split along one dimension. Each is a module of its own,
    so that freezing and checkpoints name it ``<layer>.<modality>``.

    Args:
        config: Supplies the parameter type and the sequence-parallel switch.
        kernels: Hold and multiply the matrices.
        output_size: Rows of the whole matrix.
        input_size: Columns of the whole matrix.
        tp_group: Tensor-parallel ranks.
        partition_stride: Blocks of the output that are split each on its own (2 for [gate; up]).
        bias: A bias per modality, split like the rows; only where the output is split.
        shared: Both modalities go through one matrix, which then has two names.
    """

    partition_dim: ClassVar[int]
    """0 splits the output, 1 the input."""
    reads_weights_of_children = True
    """For one product of both; whoever gathers weights late has to know (``training.overlap``)."""

    def __init__(
        self,
        config: ModelParallelConfig,
        kernels: Kernels,
        output_size: int,
        input_size: int,
        tp_group: ProcessGroup,
        partition_stride: int = 1,
        bias: bool = False,
        shared: bool = False,
    ):
        super().__init__(config=config)
        self.tp_group = tp_group
        if self.partition_dim == 0:
            output_size = divide(output_size, tp_group.size())
        else:
            input_size = divide(input_size, tp_group.size())
        build = partial(kernels.linear, input_size, output_size, bias=bias, dtype=config.params_dtype)
        self.text = build()
        self.visual = self.text if shared else build()
        self.product = kernels.modality_product(self.text, self.visual)
        for parameter in self.parameters():
            set_tensor_model_parallel_attributes(
                parameter, is_parallel=True, dim=self.partition_dim, stride=partition_stride
            )


class ModalityColumnParallelLinear(ModalityLinear):
    """[t/tp, 1, in] under sequence parallelism, else [t, 1, in] -> [t, 1, out/tp], rows in modality-major order."""

    partition_dim = 0

    def forward(self, hidden_states: Tensor, packed_seq_params: NaViLPackedSeqParams) -> Tensor:
        """Project each token with its modality's matrix."""
        output = self.product(
            hidden_states.flatten(0, 1),
            packed_seq_params.num_text_tokens,
            self.tp_group if self.tp_group.size() > 1 else None,
            self.config.sequence_parallel,
        )
        return output.unsqueeze(1)


class ModalityRowParallelLinear(ModalityLinear):
    """[t, 1, in/tp] -> [t/tp, 1, out] under sequence parallelism, else [t, 1, out], rows in modality-major order."""

    partition_dim = 1

    def forward(self, hidden_states: Tensor, packed_seq_params: NaViLPackedSeqParams) -> Tensor:
        """Project each token with its modality's matrix and sum over the ranks."""
        num_text = packed_seq_params.num_text_tokens
        partial = self.product(hidden_states.flatten(0, 1), num_text, None, False)
        return reduce_over_tensor_parallel(partial.unsqueeze(1), self.config, self.tp_group)


class ComposedRowParallelLinear(ModalityRowParallelLinear):
    """Output projection of the released 2B model: text rows get W_text x, visual rows W_visual (W_text x).

    Reference behaviour of InternLM2VE, which differs from the paper's equation. W_visual acts on the summed output, so
    each rank holds it whole and applies it to the visual rows of its own share. Such a share may end anywhere, which
    no FP8 product takes, so W_visual is multiplied in plain torch.
    """

    def __init__(
        self, config: ModelParallelConfig, kernels: Kernels, output_size: int, input_size: int, tp_group: ProcessGroup
    ):
        super().__init__(config, kernels, output_size, input_size, tp_group)
        del self.product  # which holds a matrix of another size
        self.visual = nn.Linear(output_size, output_size, bias=False, dtype=config.params_dtype)
        self.visual.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, packed_seq_params: NaViLPackedSeqParams) -> Tensor:
        """Project all tokens with the text matrix, then the visual ones again."""
        partial = self.text(hidden_states)
        output = reduce_over_tensor_parallel(partial, self.config, self.tp_group)
        ranks = self.tp_group.size() if self.config.sequence_parallel else 1
        num_text = packed_seq_params.local_num_text_tokens(self.tp_group.rank() if ranks > 1 else 0, ranks)
        return torch.cat([output[:num_text], self.visual(output[num_text:])])


def reduce_over_tensor_parallel(partial: Tensor, config: ModelParallelConfig, tp_group: ProcessGroup) -> Tensor:
    """Sum the ranks' partial outputs: reduce-scatter along the rows under sequence parallelism, else all-reduce."""
    if config.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(partial, group=tp_group)
    return reduce_from_tensor_model_parallel_region(partial, group=tp_group)
