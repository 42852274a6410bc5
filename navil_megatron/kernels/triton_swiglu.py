"""SwiGLU in one kernel each way, computed in float32 and rounded once; a program takes a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Numbers of a row that a program holds at once."""


@torch.library.custom_op("navil::swiglu", mutates_args=())
def swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """See ``layers.kernels``."""
    width = gate_up.shape[-1] // 2
    output = gate_up.new_empty(*gate_up.shape[:-1], width)
    _forward_kernel[(output.numel() // width,)](gate_up.contiguous(), weights, output, width, BLOCK)
    return output


@swiglu.register_fake
def _(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def swiglu_gradient(grad_output: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """See ``layers.kernels``."""
    grad, of_weights = _backward(grad_output, gate_up, weights)
    return grad, None if weights is None else of_weights


@torch.library.custom_op("navil::swiglu_gradient", mutates_args=())
def _backward(grad_output: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    width = gate_up.shape[-1] // 2
    grad = gate_up.new_empty(gate_up.shape)
    of_weights = gate_up.new_empty(0) if weights is None else weights.new_empty(weights.shape)
    _backward_kernel[(grad_output.numel() // width,)](
        grad_output.contiguous(), gate_up.contiguous(), weights, grad, of_weights, width, BLOCK
    )
    return grad, of_weights


@_backward.register_fake
def _(grad_output: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    of_weights = gate_up.new_empty(0) if weights is None else weights.new_empty(weights.shape)
    return gate_up.new_empty(gate_up.shape), of_weights


@triton.jit
def _forward_kernel(gate_up, weights, output, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0 if weights is None else tl.load(weights + row).to(tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        gate = tl.load(gate_up + row * 2 * width + columns, columns < width, 0.0).to(tl.float32)
        up = tl.load(gate_up + (row * 2 + 1) * width + columns, columns < width, 0.0).to(tl.float32)
        tl.store(output + row * width + columns, gate * tl.sigmoid(gate) * up * weight, columns < width)


@triton.jit
def _backward_kernel(grad_output, gate_up, weights, grad, of_weights, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0 if weights is None else tl.load(weights + row).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        gate = tl.load(gate_up + row * 2 * width + columns, columns < width, 0.0).to(tl.float32)
        up = tl.load(gate_up + (row * 2 + 1) * width + columns, columns < width, 0.0).to(tl.float32)
        given = tl.load(grad_output + row * width + columns, columns < width, 0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        total += given * gate * sigmoid * up
        given *= weight
        of_gate = given * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(grad + row * 2 * width + columns, of_gate, columns < width)
        tl.store(grad + (row * 2 + 1) * width + columns, given * gate * sigmoid, columns < width)
    if weights is not None:
        tl.store(of_weights + row, tl.sum(total, 0))
