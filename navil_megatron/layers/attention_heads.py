"""From the fused projection's rows to what the softmax takes, in one step each way.

Split, head norms, rotary positions and the way to attention order: each alone would read and write every query.
"""

from typing import Any

import torch
from torch import Tensor

from navil_megatron.layers.kernels import FusedHeads, HeadNorms, Kernels


class AttentionHeads(torch.autograd.Function):
    """Keeps no query, key or value for its backward pass, and the fused rows alone where norms need them."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        norm_weights: Tensor | None,
        is_visual: Tensor | None,
        epsilon: float,
        order: Tensor | None,
        inverse: Tensor | None,
        rotary: Tensor,
        fused: FusedHeads,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [t, ., ., d], orders [t] int64 -> query [t, n, d], key and value [t, g, d]; see ``layers.kernels``."""
        norms = None if norm_weights is None else HeadNorms(norm_weights, is_visual, epsilon)
        ctx.save_for_backward(None if norms is None else qkv, norm_weights, is_visual, inverse, rotary)
        ctx.epsilon, ctx.fused, ctx.kernels = epsilon, fused, kernels
        return kernels.attention_heads(qkv, fused, order, rotary, norms)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the fused rows and of the norms' weights."""
        qkv, norm_weights, is_visual, inverse, rotary = ctx.saved_tensors
        norms = None if norm_weights is None else HeadNorms(norm_weights, is_visual, ctx.epsilon)
        found = ctx.kernels.attention_heads_gradient(grads, qkv, ctx.fused, inverse, rotary, norms)
        return *found, *[None] * 7
