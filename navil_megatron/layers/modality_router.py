"""Which experts a token goes to: those of its modality, and of several there those that a learned router chooses.

Nothing is dropped. The balance losses of a router (Switch Transformer's, and ST-MoE's z-loss) look at one modality at a
time: text never pays for visual load.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from navil_megatron.blueprint.experts_placement import experts_side_by_side
from navil_megatron.config.modality import MODALITIES
from navil_megatron.layers.modality import NaViLPackedSeqParams

MEASURED = ("tokens", "entropy", "balance_loss", "z_loss")
"""What ``ModalityRouter.sums`` adds up for each modality: tokens, and over them the three values that follow."""


class ModalityRouter(MegatronModule):
    """Routes each row inside its modality. One expert per modality needs no parameters: the plan knows on the host."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection):
        super().__init__(config=config)
        assert config.num_moe_experts is not None
        self.num_experts, self.num_chosen = config.num_moe_experts // len(MODALITIES), config.moe_router_topk
        self.block = experts_side_by_side(self.num_experts, pg_collection.ep.size())
        self.row_group = pg_collection.tp_cp
        self.rank: int = pg_collection.tp.rank() if config.sequence_parallel else 0
        self.num_shares: int = pg_collection.tp.size() if config.sequence_parallel else 1
        if self.num_experts > 1:
            for modality in MODALITIES:
                gate = nn.Linear(config.hidden_size, self.num_experts, bias=False, dtype=config.params_dtype)
                # Every rank of the group routes its own share of the rows: core sums their gradients.
                gate.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
                self.add_module(modality, gate)
            # Of this rank's rows, padding not counted, until somebody zeroes them. Recompute may count a row twice.
            both = len(MODALITIES)
            self.register_buffer("load", torch.zeros(both, self.num_experts), persistent=False)
            self.register_buffer("sums", torch.zeros(both, len(MEASURED)), persistent=False)

    def sizes(self, num_rows: int, packed_seq_params: NaViLPackedSeqParams) -> tuple[int, int]:
        """Text and visual rows of this rank's share."""
        num_text = packed_seq_params.local_num_text_tokens(self.rank, self.num_shares)
        return num_text, num_rows - num_text

    def forward(self, rows: Tensor, packed_seq_params: NaViLPackedSeqParams) -> tuple[Tensor, Tensor]:
        """Weights in the type of the rows, and experts by their number inside the modality, both [rows, chosen].

        The weights of a token sum to 1, so equal experts compute what one would (``convert upcycle``). Where only one
        is chosen, the sum is taken for a constant: else the weight's gradient, and the router's, would be nothing.
        """
        if self.num_experts == 1:
            # In the rows' own type: core sums expert outputs over tensor-parallel ranks in the type of the weights.
            return rows.new_ones(len(rows), 1), torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        parts = rows.split(self.sizes(len(rows), packed_seq_params))
        pairs = zip(MODALITIES, parts, strict=True)
        logits = [self.get_submodule(modality)(part).float() for modality, part in pairs]
        values, chosen = torch.cat([part.softmax(-1) for part in logits]).topk(self.num_chosen)
        total = values.sum(-1, keepdim=True)
        weights = (values / (total.detach() if self.num_chosen == 1 else total)).to(rows.dtype)
        if torch.is_grad_enabled() and packed_seq_params.router_loss_scale is not None:
            loss = self._balance_losses(logits, chosen, packed_seq_params)
            weights = MoEAuxLossAutoScaler.apply(weights, loss)
        return weights, chosen

    def _balance_losses(self, logits: list[Tensor], chosen: Tensor, plan: NaViLPackedSeqParams) -> Tensor:
        """Counts the load; -> both losses of both modalities, [].

        Each is a sum over the modality's tokens, times what makes it, after the division of all gradients by the
        weight of the global batch, the mean over the modality's tokens of the global batch.
        """
        is_token = plan.sample_tokens[self.rank * len(chosen) :][: len(chosen)].float()
        sizes = [len(part) for part in logits]
        pairs = zip(chosen.split(sizes), is_token.split(sizes), strict=True)
        loads = torch.stack([self._load(experts, counted) for experts, counted in pairs])
        # In the backward pass autograd has a number: the layer is computed again, and its tokens were counted before.
        is_first = torch._C._current_graph_task_id() == -1
        if is_first:
            self.get_buffer("load").add_(loads)
        if self.row_group.size() > 1:
            torch.distributed.all_reduce(loads, group=self.row_group)
        # k * sum(share of the choices * sum of the scores): a token's part is 1 at perfect balance.
        shares = loads / loads.sum(-1, keepdim=True).clamp(min=1)
        sums = []
        for values, counted, share in zip(logits, is_token.split(sizes), shares, strict=True):
            scores, log_sum = values.softmax(-1), values.logsumexp(-1)
            balance = self.num_experts * (share * (scores * counted.unsqueeze(1)).sum(0)).sum()
            entropy = ((log_sum - (scores * values).sum(-1)) * counted).sum()
            sums.append(torch.stack([counted.sum(), entropy, balance, (log_sum.square() * counted).sum()]))
        measured = torch.stack(sums)
        if is_first:
            self.get_buffer("sums").add_(measured.detach())
        losses = self.config.moe_aux_loss_coeff * measured[:, 2] + self.config.moe_z_loss_coeff * measured[:, 3]
        return (plan.router_loss_scale * losses).sum()

    def _load(self, experts: Tensor, counted: Tensor) -> Tensor:
        """Choices [rows, chosen] of one modality and which rows count [rows] -> rows of each expert [k]."""
        ones = counted.unsqueeze(1).expand(experts.shape).flatten()
        return counted.new_zeros(self.num_experts).scatter_add(0, experts.flatten(), ones)

    def over_ranks(self, weights: Tensor, chosen: Tensor, num_text: int) -> tuple[Tensor, Tensor]:
        """Weights, 0 where not chosen, and routing map (bool), both [rows, e]: what core's dispatcher takes.

        Columns are experts in the order of the ranks that hold them.
        """
        visual = (torch.arange(len(chosen), device=chosen.device) >= num_text).long().unsqueeze(1)
        both = len(MODALITIES) * self.block
        place = chosen // self.block * both + visual * self.block + chosen % self.block
        dense = weights.new_zeros(len(weights), self.num_experts * len(MODALITIES))
        # Not "weight > 0": a chosen expert's weight may round to zero, and the dispatcher counts on all being there.
        routing_map = torch.zeros_like(dense, dtype=torch.bool).scatter(1, place, True)
        return dense.scatter(1, place, weights), routing_map
