"""Whole numbers on a GPU that is not there whose values follow from what the host put there.

Where core's all-to-all of experts asks how many rows each one has, sizes hang on the answer. So small tensors of whole
numbers are computed a second time, on the host. Routers are taken for even.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_any, tree_map

aten, c10d = torch.ops.aten, torch.ops.c10d
_WHOLE = (torch.bool, torch.uint8, torch.int32, torch.int64)
_MOST_NUMBERS = 2**23
"""More than a microbatch has places and orders, fewer than its pixels."""
_WITHOUT_VALUES = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_BY_SHAPE = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
_UNKNOWN = object()

type Gather = Callable[[Tensor, int], Tensor]
"""What so many ranks have together, one after the other, where this one has the first."""


def gather_alike(own: Tensor, num_ranks: int) -> Tensor:
    """All have the same."""
    return torch.cat([own] * num_ranks)


class KnownValues:
    """The values of one rank, each kept on its tensor as ``known``."""

    def __init__(self, gather: Gather = gather_alike) -> None:
        """``gather``: what the peers have."""
        self._gather = gather

    def follow(self, func: Any, args: tuple, kwargs: dict[str, Any], made: Any) -> None:
        """Notes the values of what an operation gave, if they are known."""
        if func.namespace == "c10d":
            if func is c10d._allgather_base_.default and _value(args[1]) is not _UNKNOWN:
                args[0].known = _on_host(self._gather, args[1].known, args[0].shape[0] // args[1].shape[0])
            return
        if func is aten.topk.default:
            made[1].known = _on_host(_evenly, made[1].shape, args[0].shape[-1])
            return
        outputs: list[Any] = [
            each for each in (made if isinstance(made, list | tuple) else (made,)) if torch.is_tensor(each)
        ]
        if not outputs or any(each.dtype not in _WHOLE or each.numel() > _MOST_NUMBERS for each in outputs):
            return
        if func._opname in _BY_SHAPE:
            args = (_on_host(torch.empty, args[0].shape), *args[1:])
        inputs = _values((args, kwargs))
        if func._opname in _WITHOUT_VALUES or tree_any(lambda value: value is _UNKNOWN, inputs):
            if func._schema.is_mutable:
                vars(args[0]).pop("known", None)
            return
        values = _on_host(func, *inputs[0], **inputs[1])
        for output, value in zip(outputs, values if isinstance(values, list | tuple) else (values,), strict=True):
            output.known = value


def read(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an operation that reads a tensor of the device gives; None: it reads nothing, or nobody knows."""
    if func is aten._local_scalar_dense.default:
        value = _value(args[0])
        return _on_host(value.item) if value is not _UNKNOWN else 1.0 if args[0].is_floating_point() else None
    if func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
        value = _value(args[0])
        return _on_host(func, value, **kwargs) if value is not _UNKNOWN else None
    if func is aten.masked_select.default:
        mask = _value(args[1])
        return args[0].new_empty(_on_host(_count, mask)) if mask is not _UNKNOWN else None
    return None


def _value(tensor: Any) -> Any:
    """What a tensor holds on the host's side; those of the host, and numbers, are it."""
    return getattr(tensor, "known", _UNKNOWN) if isinstance(tensor, FakeTensor) else tensor


def _values(tree: Any) -> Any:
    host = torch.device("cpu")
    return tree_map(lambda leaf: host if isinstance(leaf, torch.device) else _value(leaf), tree)


def _evenly(shape: torch.Size, num_choices: int) -> Tensor:
    return torch.arange(shape.numel()).view(shape) % num_choices


def _count(mask: Tensor) -> int:
    return int(mask.sum())


def _on_host(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with unset_fake_temporarily():
        return compute(*args, **kwargs)
