"""SwiGLU feed-forward with one expert per modality, each on a rank of its own: expert parallel size 2.

Every rank sends its text rows to the rank of the text expert and its visual rows to that of the visual expert, by
megatron-core's all-to-all, and gets them back. This is right for memory: a rank holds, reduces and updates half of the
feed-forward weights. It is unbalanced for speed: with 80% visual tokens the rank of the visual expert does four times
the other's work and the other waits. Splitting both experts over tensor-parallel ranks (expert parallel size 1) is the
balanced choice wherever memory allows it.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor

from navil_megatron.config.schema import MODALITIES, Modality
from navil_megatron.layers.modality import NaViLPackedSeqParams
from navil_megatron.layers.modality_linear import LinearKernels, Offsets
from navil_megatron.layers.modality_mlp import SwiGLU


class ModalityRouter(MegatronModule):
    """Sends each row to its modality's expert. No parameters: the plan knows the modality on the host.

    Expert number = modality * (experts per modality) + choice inside the modality; there is one per modality.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection):
        super().__init__(config=config)
        self.rank: int = pg_collection.tp.rank() if config.sequence_parallel else 0
        self.num_shares: int = pg_collection.tp.size() if config.sequence_parallel else 1

    def forward(self, hidden_states: Tensor, packed_seq_params: NaViLPackedSeqParams) -> tuple[Tensor, Tensor]:
        """Probabilities (all 1) and routing map (bool), both [rows, e], of this rank's share of the rows."""
        num_text = packed_seq_params.local_num_text_tokens(self.rank, self.num_shares)
        num_rows = hidden_states.shape[0] * hidden_states.shape[1]
        visual = torch.arange(num_rows, device=hidden_states.device) >= num_text
        # In the rows' own type: core sums expert outputs over tensor-parallel ranks in the type of the probabilities.
        probabilities = hidden_states.new_ones(num_rows, len(MODALITIES))
        return probabilities, torch.stack([~visual, visual], dim=1)


class ExpertLinear(MegatronModule):
    """The matrix of the one modality whose expert lives here, named as ``ModalityLinear`` names it.

    The dispatcher has gathered the rows of the expert's tensor-parallel ranks and sums their outputs, so nothing is
    sent here. An expert without rows leaves a zero gradient, since the product with no rows is in the graph too.
    """

    def __init__(
        self,
        config: TransformerConfig,
        linears: LinearKernels,
        modality: Modality,
        output_size: int,
        input_size: int,
        pg_collection: ProcessGroupCollection,
        partition_dim: int,
        partition_stride: int = 1,
    ):
        super().__init__(config=config)
        self.modality, self.partition_dim = modality, partition_dim
        self.tp_group, self.dp_group = pg_collection.expt_tp, pg_collection.expt_dp
        shape = [output_size, input_size]
        shape[partition_dim] = divide(shape[partition_dim], self.tp_group.size())
        expert = linears.linear(shape[1], shape[0], bias=False, dtype=config.params_dtype)
        set_tensor_model_parallel_attributes(
            expert.weight, is_parallel=True, dim=partition_dim, stride=partition_stride
        )
        # Core's mark of a weight that only the ranks with the same expert share: they alone sum its gradient.
        expert.weight.allreduce = False  # type: ignore[union-attr]
        self.add_module(modality, expert)

    def forward(self, rows: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], of which in or out is this rank's part."""
        output: Tensor = self.get_submodule(self.modality)(rows)
        return output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The matrix as a shard of the whole one; its replicas are the ranks with the same expert."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {f"{self.modality}.weight": self.partition_dim},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=self.dp_group,
        )


class ModalityExperts(MegatronModule):
    """[t/tp, 1, h] or [t, 1, h] -> the same, rows in modality-major order. Takes the place of ``ModalityMLP``.

    Core's ``MoELayer`` asks its router with the hidden states alone, and the plan must be an argument; so its
    dispatcher is driven from here. The dispatcher remembers one forward pass between its own calls, nothing longer.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, linears: LinearKernels, **_: Any
    ):
        super().__init__(config=config)
        number = pg_collection.ep.rank()
        self.modality = MODALITIES[number]
        self.router = ModalityRouter(config, pg_collection)
        self.dispatcher = MoEAlltoAllTokenDispatcher(1, [number], config, pg_collection)
        hidden, inner = config.hidden_size, config.ffn_hidden_size
        self.linear_fc1 = ExpertLinear(
            config, linears, self.modality, 2 * inner, hidden, pg_collection, 0, partition_stride=2
        )
        self.linear_fc2 = ExpertLinear(config, linears, self.modality, hidden, inner, pg_collection, 1)

    def forward(self, hidden_states: Tensor, packed_seq_params: NaViLPackedSeqParams) -> Tensor:
        """Each token through its modality's expert. Every rank sends and receives, with no rows too."""
        dispatcher = self.dispatcher
        probabilities, routing_map = self.router(hidden_states, packed_seq_params)
        rows, probabilities = dispatcher.dispatch_preprocess(hidden_states, routing_map, probabilities)
        rows, probabilities = dispatcher.token_dispatch(rows, probabilities)
        rows, _, _ = dispatcher.dispatch_postprocess(rows, probabilities)
        rows = self.linear_fc2(SwiGLU.apply(self.linear_fc1(rows)))
        return dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(rows)))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Same keys and whole shapes as ``ModalityMLP``, of the expert that lives here."""
        sharded = self.linear_fc1.sharded_state_dict(f"{prefix}linear_fc1.", sharded_offsets, metadata)
        (key,) = sharded
        sharded[key] = apply_swiglu_sharded_factory(sharded[key], sharded_offsets, tp_group=self.linear_fc1.tp_group)
        sharded.update(self.linear_fc2.sharded_state_dict(f"{prefix}linear_fc2.", sharded_offsets, metadata))
        return sharded
