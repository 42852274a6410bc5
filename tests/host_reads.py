"""Finds every place where the host asks for a value that is on the device, on a CPU, where asking costs nothing.

Such a read makes the host wait for all queued kernels. A read shows as an operator (``item``, ``nonzero``, an index
with a boolean mask), or, where a CPU needs no operator for it (``tolist``, ``numpy``), as a method of the tensor.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READING_OPERATORS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.nonzero_static.default,
    aten.masked_select.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
INDEXING_OPERATORS = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
READING_METHODS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
MASKS = (torch.bool, torch.uint8)


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = operator in INDEXING_OPERATORS and any(index is not None and index.dtype in MASKS for index in args[1])
        if operator in READING_OPERATORS or masked:
            self.found.append(f"{operator} at {_where()}")
        return operator(*args, **(kwargs or {}))


@contextmanager
def _watching_methods(found: list[str]) -> Iterator[None]:
    """On the class itself: a torch function mode does not reach into the backward pass of our own functions."""
    own = {name: Tensor.__dict__[name] for name in READING_METHODS if name in Tensor.__dict__}

    def watched(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def noting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append(f"{name} at {_where()}")
            return read(tensor, *args, **kwargs)

        return noting

    def setting(tensor: Tensor, index: Any, value: Any) -> None:
        # A number into rows that a mask marks fills them on a GPU without a read, whatever operator this version of
        # torch names for it on a CPU.
        mask, *rest = index if isinstance(index, tuple) else (index,)
        is_mask = isinstance(mask, Tensor) and mask.dtype == torch.bool and all(part == slice(None) for part in rest)
        if is_mask and isinstance(value, int | float):
            tensor.masked_fill_(mask.reshape(*mask.shape, *(1,) * (tensor.dim() - mask.dim())), value)
        else:
            set_item(tensor, index, value)

    set_item = Tensor.__setitem__
    Tensor.__setitem__ = setting  # type: ignore[method-assign]
    for name in READING_METHODS:
        setattr(Tensor, name, watched(name, getattr(Tensor, name)))
    try:
        yield
    finally:
        del Tensor.__setitem__
        for name in READING_METHODS:
            if name in own:
                setattr(Tensor, name, own[name])
            else:
                delattr(Tensor, name)


def _where() -> str:
    """The innermost line of ours or of megatron-core that led here, not counting what stands in for CUDA on a CPU."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.endswith("runtime/mcore_on_cpu.py"):
            continue
        if "/navil_megatron/" in frame.filename or "/megatron/core/" in frame.filename:
            return f"{frame.filename.rpartition('/site-packages/')[2]}:{frame.lineno}: {frame.line}"
    return "a place outside"


@contextmanager
def watching_host_reads() -> Iterator[list[str]]:
    """Every read of a tensor's value that happens inside, with its line."""
    found: list[str] = []
    with _watching_methods(found), _Operators(found):
        yield found
