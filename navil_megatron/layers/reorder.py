"""Rows in another order, whose gradient is put back by a gather too.

Autograd does not know that the index is a permutation: it fills zeros and adds row after row to them, on a GPU with
atomic additions. The inverse permutation is at hand.
"""

from typing import Any

import torch
from torch import Tensor


class Reorder(torch.autograd.Function):
    """rows[order] for a permutation and its inverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """rows [t, ...], order and inverse [t] int64 -> [t, ...]."""
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        """The gradient, in the order that the rows had."""
        (inverse,) = ctx.saved_tensors
        return grad_output.index_select(0, inverse), None, None
