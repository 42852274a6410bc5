"""megatron-core's transformer layer, handing the modality plan to the feed-forward experts too.

Core already threads ``packed_seq_params`` to the attention and to ``_forward_mlp``; only the last step is ours.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn


class NaViLTransformerLayer(TransformerLayer):
    """One decoder layer: norm, modality attention, residual, norm, modality experts, residual. Norms are shared.

    Args:
        *args: As of core's.
        recompute: Of ``layers.kernels``.
        recomputes_all: The whole layer, not only what core's config names. Core would enter an FP8 recipe anew there.
        **options: As of core's.
    """

    def __init__(self, *args: Any, recompute: Callable[..., Any], recomputes_all: bool, **options: Any):
        super().__init__(*args, **options)
        self.recompute, self.recomputes_all = recompute, recomputes_all

    def forward(self, hidden_states: Tensor, *, rotary_pos_emb: Tensor, **options: Any) -> tuple[Tensor, None]:
        """As of core's."""

        def run(hidden_states: Tensor, rotary_pos_emb: Tensor) -> tuple[Tensor, None]:
            output: tuple[Tensor, None] = super(NaViLTransformerLayer, self).forward(
                hidden_states=hidden_states, rotary_pos_emb=rotary_pos_emb, **options
            )
            return output

        if self.recomputes_all and torch.is_grad_enabled():
            recomputed: tuple[Tensor, None] = self.recompute(run, hidden_states, rotary_pos_emb)
            return recomputed
        return run(hidden_states, rotary_pos_emb)

    def _forward_mlp(
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        padding_mask: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        normed = self._forward_pre_mlp_layernorm(hidden_states)
        # It would hold the layer's first half until its next forward pass: recompute stops before core lets it go.
        self.mlp_norm_manager = None
        if self.recompute_mlp and torch.is_grad_enabled():
            output = self.recompute(self.mlp, normed, packed_seq_params)
        else:
            output = self.mlp(normed, packed_seq_params)
        return self._forward_post_mlp((output, None), hidden_states)


def decoder_norm(
    build: Callable[..., nn.Module], config: TransformerConfig, hidden_size: int, eps: float = 1e-6
) -> nn.Module:
    """RMSNorm of the decoder, by a builder of ``kernels.norms``, which allows sequence parallelism.

    Each rank sees its own tokens there, so the weight's gradient is summed over the tensor-parallel ranks: core does so
    for parameters marked ``sequence_parallel``.
    """
    norm = build(hidden_size, eps=eps, dtype=config.params_dtype)
    norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[union-attr]
    return norm


def residual_add(training: bool, fused: bool) -> Callable[[tuple[Tensor, None], Tensor, float], Tensor]:
    """The residual connection in the place where core expects bias, dropout and add: NaViL has neither bias nor
    dropout in the decoder, and core's version draws a dropout mask even at probability 0.
    """

    def add(output_with_bias: tuple[Tensor, None], residual: Tensor, dropout_probability: float) -> Tensor:
        return residual + output_with_bias[0]

    return add
