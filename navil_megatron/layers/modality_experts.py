"""SwiGLU feed-forward experts that live on different ranks, or of which each modality has several.

With expert parallelism every rank sends its rows to the ranks of their experts by megatron-core's all-to-all and gets
them back. Without it all experts are here and rows are only sorted. docs/experts.md says when to use which.
"""

from itertools import accumulate
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor

from navil_megatron.blueprint.experts_placement import local_experts
from navil_megatron.config.modality import MODALITIES, Modality
from navil_megatron.layers.expert_linear import ExpertLinear
from navil_megatron.layers.kernels import Kernels
from navil_megatron.layers.modality import NaViLPackedSeqParams
from navil_megatron.layers.modality_router import ModalityRouter
from navil_megatron.layers.reorder import Reorder
from navil_megatron.layers.swiglu import SwiGLU


class ModalityExperts(MegatronModule):
    """[t/tp, 1, h] or [t, 1, h] -> the same, rows in modality-major order. Takes the place of ``ModalityMLP``.

    Core's ``MoELayer`` asks its router with the hidden states alone, and the plan must be an argument; so its
    dispatcher is driven from here. The dispatcher remembers one forward pass between its own calls, nothing longer.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection, kernels: Kernels, **_: Any):
        super().__init__(config=config)
        assert config.num_moe_experts is not None
        self.pg_collection, self.kernels = pg_collection, kernels
        rank, num_ranks = pg_collection.ep.rank(), pg_collection.ep.size()
        self.experts = local_experts(rank, num_ranks, config.num_moe_experts // len(MODALITIES))
        self.router = ModalityRouter(config, pg_collection)
        self.dispatcher: MoEAlltoAllTokenDispatcher | None = None
        if num_ranks > 1:
            num_local = divide(config.num_moe_experts, num_ranks)
            indices = list(range(rank * num_local, (rank + 1) * num_local))
            self.dispatcher = MoEAlltoAllTokenDispatcher(num_local, indices, config, pg_collection)
        hidden, inner = config.hidden_size, config.ffn_hidden_size
        self.linear_fc1 = ExpertLinear(
            config, kernels, self.experts, 2 * inner, hidden, pg_collection, 0, partition_stride=2
        )
        self.linear_fc2 = ExpertLinear(config, kernels, self.experts, hidden, inner, pg_collection, 1)

    def forward(self, hidden_states: Tensor, packed_seq_params: NaViLPackedSeqParams) -> Tensor:
        """Each token through its experts."""
        rows = hidden_states.flatten(0, 1)
        weights, chosen = self.router(rows, packed_seq_params)
        if self.dispatcher is None:
            return self._all_here(rows, weights, chosen, packed_seq_params).view(hidden_states.shape)
        return self._dispatched(self.dispatcher, hidden_states, weights, chosen, packed_seq_params)

    def _all_here(self, rows: Tensor, weights: Tensor, chosen: Tensor, plan: NaViLPackedSeqParams) -> Tensor:
        """[rows, h] -> [rows, h]. The host knows how many rows each modality has, and that is all it must know."""
        group, router = self.pg_collection.expt_tp, self.router
        split = group.size()
        if split > 1:
            rows, weights, chosen = (
                gather_from_sequence_parallel_region(part, group=group) for part in (rows, weights, chosen)
            )
        num_text = plan.local_num_text_tokens(router.rank // split, router.num_shares // split)
        sizes = (num_text, len(rows) - num_text)
        parts = zip(MODALITIES, rows.split(sizes), weights.split(sizes), chosen.split(sizes), strict=True)
        output = torch.cat([self._sorted(*part) for part in parts])
        return reduce_scatter_to_sequence_parallel_region(output, group=group) if split > 1 else output

    def _sorted(self, modality: Modality, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Rows [r, h] of one modality, weights and experts [r, chosen] -> [r, h]: sorted by expert and put back."""
        times = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        inverse = order.argsort()
        counts = torch.zeros(self.router.num_experts, dtype=torch.long, device=rows.device)
        counts = counts.scatter_add(0, chosen.flatten(), torch.ones_like(order))
        repeated = rows.unsqueeze(1).expand(-1, times, -1).flatten(0, 1)
        arranged, factors = Reorder.apply(repeated, order, inverse), Reorder.apply(weights.flatten(), order, inverse)
        output = self._experts(modality, arranged, counts.cumsum(0).int(), factors)
        return Reorder.apply(output, inverse, order).unflatten(0, (-1, times)).sum(1)

    def _dispatched(
        self,
        dispatcher: MoEAlltoAllTokenDispatcher,
        hidden_states: Tensor,
        weights: Tensor,
        chosen: Tensor,
        plan: NaViLPackedSeqParams,
    ) -> Tensor:
        """To the ranks of the experts and back. Every rank sends and receives, with no rows too."""
        num_text, _ = self.router.sizes(len(chosen), plan)
        weights, routing_map = self.router.over_ranks(weights, chosen, num_text)
        rows, weights = dispatcher.dispatch_preprocess(hidden_states, routing_map, weights)
        rows, weights = dispatcher.token_dispatch(rows, weights)
        rows, num_rows, weights = dispatcher.dispatch_postprocess(rows, weights)
        numbers = iter(num_rows.tolist())  # core has put them on the host already
        of_modality = {modality: [next(numbers) for _ in experts] for modality, experts in self.experts.items()}
        sizes = [sum(counts) for counts in of_modality.values()]
        outputs = []
        for (modality, counts), part, factors in zip(
            of_modality.items(), rows.split(sizes), weights.split(sizes), strict=True
        ):
            # Filled on the device: a copy of numbers that the host holds may make it wait.
            ends = torch.stack(
                [torch.full((), end, dtype=torch.int32, device=rows.device) for end in accumulate(counts)]
            )
            outputs.append(self._experts(modality, part, ends, factors))
        rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(rows)))

    def _experts(self, modality: Modality, rows: Tensor, ends: Tensor, weights: Tensor) -> Tensor:
        """Rows [r, h] of one modality sorted by expert, where each expert's end, weights [r] -> [r, h]."""
        gate_up = self.linear_fc1(rows, modality, ends)
        # What follows is linear, so the weight may go first and the row's experts then only have to be summed.
        inner = SwiGLU.apply(gate_up, weights if self.router.num_experts > 1 else None, self.kernels)
        return self.linear_fc2(inner, modality, ends)
