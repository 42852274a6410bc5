"""megatron-core's transformer layer, handing the modality plan to the feed-forward experts too.

Core already threads ``packed_seq_params`` to the attention and to ``_forward_mlp``; only the last step is ours.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class NaViLTransformerLayer(TransformerLayer):
    """One decoder layer: norm, modality attention, residual, norm, modality experts, residual. Norms are shared."""

    def _forward_mlp(
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        padding_mask: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        normed = self._forward_pre_mlp_layernorm(hidden_states)
        if self.recompute_mlp and torch.is_grad_enabled():
            output = torch.utils.checkpoint.checkpoint(
                self._experts, normed, packed_seq_params, use_reentrant=False, preserve_rng_state=False
            )
        else:
            output = self.mlp(normed, packed_seq_params)
        return self._forward_post_mlp((output, None), hidden_states)

    def _experts(self, normed: Tensor, packed_seq_params: Any) -> Tensor:
        """The feed-forward network; its second run, in the backward pass, is in the layer's precision too."""
        with self.get_inner_quantization_context():
            output: Tensor = self.mlp(normed, packed_seq_params)
        return output


def residual_add(training: bool, fused: bool) -> Callable[[tuple[Tensor, None], Tensor, float], Tensor]:
    """The residual connection in the place where core expects bias, dropout and add: NaViL has neither bias nor
    dropout in the decoder, and core's version draws a dropout mask even at probability 0.
    """

    def add(output_with_bias: tuple[Tensor, None], residual: Tensor, dropout_probability: float) -> Tensor:
        return residual + output_with_bias[0]

    return add
