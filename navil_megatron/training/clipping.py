"""Norm of the gradients and clipping by it, on the device from end to end.

Megatron-core takes both from Transformer Engine. Where that is not installed, its own versions ask the device for one
number a parameter, and the host waits for each.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_applier
from torch import Tensor


def clip_on_device() -> None:
    """Makes core's optimizers use the functions below; they then give the norm as a tensor, [1]."""
    clip_grads.multi_tensor_applier = local_multi_tensor_applier
    clip_grads.l2_norm_impl = _l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = _scale


def _l2_norm(_chunk_size: int, _overflow: Tensor, lists: Sequence[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """The norm of all tensors together, [1] float32, and none of each."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(lists[0]))).unsqueeze(0), None


def _scale(_chunk_size: int, _overflow: Tensor, lists: Sequence[list[Tensor]], factor: Tensor) -> None:
    """Every gradient times a number, [1], in place: source and destination are the same."""
    torch._foreach_mul_(lists[1], factor.squeeze())
