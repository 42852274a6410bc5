"""Self-attention with one set of projections per modality and one joint causal softmax (paper, section 3.2.2).

Projections run on modality-major rows. Queries, keys and values are gathered into attention order once, and the
attention output back once; nothing else in a decoder layer moves tokens. Context-parallel ranks exchange heads there.
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
from navil_megatron.layers.head_exchange import heads_to_rows, rows_to_heads
from navil_megatron.layers.kernels import Kernels
from navil_megatron.layers.modality import NaViLPackedSeqParams
from navil_megatron.layers.modality_linear import (
    ComposedRowParallelLinear,
    ModalityColumnParallelLinear,
    ModalityRowParallelLinear,
)
from navil_megatron.layers.modality_norm import ModalityHeadNorm
from navil_megatron.layers.reorder import Reorder
from navil_megatron.layers.rope import apply_rotary


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
        self.heads_per_group = divide(config.num_attention_heads, config.num_query_groups)
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
        sizes = (config.hidden_size, query_size)
        self.linear_proj = (
            ComposedRowParallelLinear(config, kernels, *sizes, tp_group)
            if language.composed_visual_output_projection
            else ModalityRowParallelLinear(config, kernels, *sizes, tp_group, shared=shared)
        )
        if language.qk_norm:
            self.q_layernorm = ModalityHeadNorm(config, self.head_dim, shared)
            self.k_layernorm = ModalityHeadNorm(config, self.head_dim, shared)
        self.core_attention = kernels.segment_attention
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
        """[t/tp, 1, h] or [t, 1, h] -> the same, and no bias. ``rotary_pos_emb`` is [2, t, 1, d], modality-major.

        t are the tokens of this context-parallel rank, here and below.
        """
        qkv = self.linear_qkv(hidden_states, packed_seq_params)
        query, key, value = self._split_heads(qkv)
        if self.config.qk_layernorm:
            query = self.q_layernorm(query, packed_seq_params)
            key = self.k_layernorm(key, packed_seq_params)
        query, key = apply_rotary(query, rotary_pos_emb), apply_rotary(key, rotary_pos_emb)
        if self.recompute_attention and torch.is_grad_enabled():
            context = torch.utils.checkpoint.checkpoint(
                self._attend, query, key, value, packed_seq_params, use_reentrant=False, preserve_rng_state=False
            )
        else:
            context = self._attend(query, key, value, packed_seq_params)
        return self.linear_proj(context.unsqueeze(1), packed_seq_params), None

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[t, 1, (n + 2g)/tp * d] -> query [t, n/tp, d], key and value [t, g/tp, d]."""
        per_group = qkv.view(-1, self.num_groups, self.heads_per_group + 2, self.head_dim)
        query, key, value = per_group.split([self.heads_per_group, 1, 1], dim=2)
        return query.flatten(1, 2), key.squeeze(2), value.squeeze(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, packed: NaViLPackedSeqParams) -> Tensor:
        """To attention order, softmax inside each segment, and back. -> [t, n/tp * d]."""
        query, key, value = rows_to_heads(query, key, value, self.cp_group)
        to_attention, back = packed.to_attention, packed.to_modality_major
        context = self.core_attention(
            Reorder.apply(query, to_attention, back),
            Reorder.apply(key, to_attention, back),
            Reorder.apply(value, to_attention, back),
            groups=packed.attention_groups,
            cu_seqlens=packed.cu_seqlens_q,
            max_seqlen=packed.max_seqlen_q,
            causal=True,
        )
        return heads_to_rows(Reorder.apply(context, back, to_attention), self.cp_group)
