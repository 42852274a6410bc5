"""Self-attention with one set of projections per modality and one joint causal softmax (paper, section 3.2.2).

Projections run on modality-major rows. The fused queries, keys and values are gathered into attention order once, where
they are split, normed and turned, and the attention output back once; nothing else in a decoder layer moves tokens.
Context-parallel ranks exchange heads there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor

from navil_megatron.config.language import LanguageConfig
from navil_megatron.layers.attention_heads import AttentionHeads
from navil_megatron.layers.head_exchange import heads_to_rows, rows_to_heads
from navil_megatron.layers.kernels import FusedHeads, Kernels
from navil_megatron.layers.modality import NaViLPackedSeqParams
from navil_megatron.layers.modality_linear import (
    ComposedRowParallelLinear,
    ModalityColumnParallelLinear,
    ModalityRowParallelLinear,
)
from navil_megatron.layers.modality_norm import ModalityHeadNorm
from navil_megatron.layers.reorder import Reorder


@dataclass(frozen=True)
class ModalityAttentionSubmodules:
    """What varies between models and kernels."""

    kernels: Kernels
    language: LanguageConfig


class ModalitySelfAttention(MegatronModule):
    """Joint causal attention over text and visual tokens, grouped-query, packed.

    The fused projection's rows are, per key/value head, its query heads, then key, then value: megatron-core's own
    grouped layout, so a tensor-parallel rank holds whole groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: ModalityAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        tp_group, kernels, language = pg_collection.tp, submodules.kernels, submodules.language
        shared = language.shares("attention")
        self.cp_group = pg_collection.cp
        self.head_dim = config.kv_channels
        self.num_groups = divide(config.num_query_groups, tp_group.size())
        self.fused = FusedHeads((divide(config.num_attention_heads, config.num_query_groups), 1, 1), dim=2)
        query_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_query_groups * self.head_dim
        self.linear_qkv = ModalityColumnParallelLinear(
            config,
            kernels,
            query_size + 2 * kv_size,
            config.hidden_size,
            tp_group,
            bias=language.qkv_bias,
            shared=shared,
        )
        if language.qk_norm:
            self.q_layernorm = ModalityHeadNorm(config, self.head_dim, shared)
            self.k_layernorm = ModalityHeadNorm(config, self.head_dim, shared)
        sizes = (config.hidden_size, query_size)
        self.linear_proj = (
            ComposedRowParallelLinear(config, kernels, *sizes, tp_group)
            if language.composed_visual_output_projection
            else ModalityRowParallelLinear(config, kernels, *sizes, tp_group, shared=shared)
        )
        self.kernels = kernels
        self.recompute_attention = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: NaViLPackedSeqParams,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[t/tp, 1, h] or [t, 1, h] -> the same, and no bias. ``rotary_pos_emb`` is [t, 2, d/2] in attention order.

        t are the tokens of this context-parallel rank, here and below; in attention order, of all.
        """
        qkv = self.linear_qkv(hidden_states, packed_seq_params)
        weights = torch.stack([self.q_layernorm(), self.k_layernorm()]) if self.config.qk_layernorm else None
        if self.recompute_attention and torch.is_grad_enabled():
            context = torch.utils.checkpoint.checkpoint(
                self._attend,
                qkv,
                weights,
                rotary_pos_emb,
                packed_seq_params,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            context = self._attend(qkv, weights, rotary_pos_emb, packed_seq_params)
        return self.linear_proj(context.unsqueeze(1), packed_seq_params), None

    def _attend(self, qkv: Tensor, norm_weights: Tensor | None, rotary: Tensor, packed: NaViLPackedSeqParams) -> Tensor:
        """To attention order, softmax inside each segment, and back. [t, 1, (n + 2g)/tp * d] -> [t, n/tp * d]."""
        to_attention, back = packed.to_attention, packed.to_modality_major
        per_group = qkv.view(-1, self.num_groups, sum(self.fused.sizes), self.head_dim)
        query, key, value = AttentionHeads.apply(
            rows_to_heads(per_group, self.cp_group),
            norm_weights,
            packed.is_visual if norm_weights is not None and norm_weights.shape[1] > 1 else None,
            self.config.layernorm_epsilon,
            to_attention,
            back,
            rotary,
            self.fused,
            self.kernels,
        )
        context = self.kernels.segment_attention(
            query,
            key,
            value,
            groups=packed.attention_groups,
            cu_seqlens=packed.cu_seqlens_q,
            max_seqlen=packed.max_seqlen_q,
            causal=True,
        )
        return heads_to_rows(Reorder.apply(context, back, to_attention), self.cp_group)
