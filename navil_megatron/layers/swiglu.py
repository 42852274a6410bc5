"""SwiGLU, which keeps its inputs alone for the backward pass."""

from typing import Any

import torch
from torch import Tensor

from navil_megatron.layers.kernels import Kernels


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up for [gate | up] along the last dimension, and times a weight for each row where there is one."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor | None, kernels: Kernels) -> Tensor:
        """[..., 2f] and [...] -> [..., f]."""
        ctx.save_for_backward(gate_up, weights)
        ctx.kernels = kernels
        return kernels.swiglu(gate_up, weights)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """[..., f] -> [..., 2f] and [...]."""
        gate_up, weights = ctx.saved_tensors
        return *ctx.kernels.swiglu_gradient(grad_output, gate_up, weights), None
