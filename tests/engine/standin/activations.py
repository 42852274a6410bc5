"""Gated and plain activations and their backward, in the input's type or in FP8."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from tests.engine.standin.calls import exported
from tests.engine.standin.quantize import quantized


def _gated(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """[..., 2 f]: the first half through the function, times the second."""

    def both(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return function(first) * second

    return both


def _forward(function, input, quantizer):
    out = function(input.detach().float()).to(input.dtype)
    return out if quantizer is None else quantized(out, quantizer)


def _backward(function, grad, fwd_input, quantizer):
    with torch.enable_grad():
        leaf = fwd_input.detach().float().requires_grad_()
        (out,) = torch.autograd.grad(function(leaf), leaf, grad.float())
    out = out.to(fwd_input.dtype)
    return out if quantizer is None else quantized(out, quantizer)


_swiglu = _gated(F.silu)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


@exported
def swiglu(input, quantizer):
    """[..., 2 f] -> [..., f]."""
    return _forward(_swiglu, input, quantizer)


@exported
def dswiglu(grad, fwd_input, quantizer):
    """[..., f] -> [..., 2 f]."""
    return _backward(_swiglu, grad, fwd_input, quantizer)


@exported
def gelu(input, quantizer):
    """By tanh."""
    return _forward(_gelu, input, quantizer)


@exported
def dgelu(grad, fwd_input, quantizer):
    """By tanh."""
    return _backward(_gelu, grad, fwd_input, quantizer)
