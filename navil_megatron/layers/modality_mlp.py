"""SwiGLU feed-forward with one expert per modality, for expert parallel size 1 (paper, section 3.2.2)."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from navil_megatron.layers.kernels import Kernels
from navil_megatron.layers.modality import NaViLPackedSeqParams
from navil_megatron.layers.modality_linear import ModalityColumnParallelLinear, ModalityRowParallelLinear
from navil_megatron.layers.swiglu import SwiGLU


class ModalityMLP(MegatronModule):
    """[t/tp, 1, h] or [t, 1, h] -> the same, rows in modality-major order."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        kernels: Kernels,
        shared: bool = False,
        **_: Any,
    ):
        super().__init__(config=config)
        self.kernels = kernels
        width = config.ffn_hidden_size
        self.linear_fc1 = ModalityColumnParallelLinear(
            config, kernels, 2 * width, config.hidden_size, pg_collection.tp, partition_stride=2, shared=shared
        )
        self.linear_fc2 = ModalityRowParallelLinear(
            config, kernels, config.hidden_size, width, pg_collection.tp, shared=shared
        )

    def forward(self, hidden_states: Tensor, packed_seq_params: NaViLPackedSeqParams) -> Tensor:
        """Each token through its modality's expert."""
        gate_up = self.linear_fc1(hidden_states, packed_seq_params)
        return self.linear_fc2(SwiGLU.apply(gate_up, None, self.kernels), packed_seq_params)
