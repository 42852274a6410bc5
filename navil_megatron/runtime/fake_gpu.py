"""A GPU that is not there: its tensors have shapes and no values, and it refuses what a real one would punish.

Tensors of the device are torch's fake ones, those of the host are real. What makes the host wait for the device is an
error while a step is watched (``host_waits``), an operation on tensors of both at any time.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from navil_megatron.runtime.host_waits import DeviceError, wait, where
from navil_megatron.runtime.known_values import KnownValues, read

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")

type Observer = Callable[[Any, tuple, dict[str, Any], Any], None]
"""Called with an operation on the device, its arguments and what it gave."""

aten, c10d = torch.ops.aten, torch.ops.c10d
_ASKS_DEVICE, _NOWHERE = torch.ops.prim.device.default, torch.device("meta")
_COPIES = {aten.copy_.default, aten._to_copy.default}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_MASKS = (torch.bool, torch.uint8)
_OF_SEVERAL_TENSORS = {
    c10d.reduce_scatter_tensor_coalesced_.default,
    c10d.allgather_into_tensor_coalesced_.default,
    c10d.allreduce_coalesced_.default,
}
"""Collectives that fake tensors do not know. Each gives its work alone."""


class ShapesOnly(FakeTensorMode):
    """torch's mode of fake tensors, which may be told of a GPU where torch finds none.

    Autograd asks C++ tensors where they are, and looks for the streams of a GPU. So C++ hears of no device, and what it
    makes without one is on the GPU. Python sees the GPU.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        if func is _ASKS_DEVICE:
            return _NOWHERE
        kwargs = kwargs or {}
        if kwargs.get("device") == _NOWHERE:
            kwargs = {**kwargs, "device": GPU}
        return super().dispatch(func, types, args, kwargs)


class FakeGPU(TorchDispatchMode):
    """Sees every operation first; entered above ``ShapesOnly``."""

    def __init__(self, observers: Sequence[Observer], known: KnownValues) -> None:
        super().__init__()
        self._observers, self._known = observers, known
        self._pinned = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is _ASKS_DEVICE:
            return _NOWHERE
        kwargs = kwargs or {}
        tensors = list(_tensors((*args, *kwargs.values())))
        of_host = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        is_on_device = len(of_host) < len(tensors)
        if not is_on_device and kwargs.get("device") in (None, HOST):
            return self._on_host(func, args, kwargs)
        if func in _COPIES:
            self._copy(func, args, kwargs, of_host)
        elif func in _INDEXING:
            _check_index(func, args)
        elif is_on_device and any(tensor.dim() for tensor in of_host):
            raise DeviceError(f"{func} on a tensor of the host and one of the device at {where()}")
        made = self._on_device(func, args, kwargs)
        for observe in self._observers:
            observe(func, args, kwargs, made)
        return made

    def _on_host(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        if func.namespace == "c10d" and next(_tensors(args), None) is not None:
            raise DeviceError(f"a tensor of the host is given to a collective of GPUs at {where()}")
        with unset_fake_temporarily():
            if func is not aten._pin_memory.default:
                return func(*args, **kwargs)
            pinned = args[0].clone()
        self._pinned[pinned.untyped_storage()] = True
        return pinned

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage() in self._pinned

    def _copy(self, func: Any, args: tuple, kwargs: dict[str, Any], of_host: list[Tensor]) -> None:
        """The host waits for a copy to it, and for one to the device that blocks or is not from pinned memory."""
        if kwargs.get("device") == HOST or (func is aten.copy_.default and of_host and args[0] is of_host[0]):
            wait(f"{func} to the host")
            if read(func, args, kwargs) is None:
                raise DeviceError(f"{func} reads what only a GPU would know at {where()}")
        elif of_host and not (self._is_pinned(of_host[0]) and (kwargs.get("non_blocking") or args[2:3] == (True,))):
            wait(f"{func} to the device that blocks or is not from pinned memory")

    def _on_device(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func in _OF_SEVERAL_TENSORS:
            return torch._C._distributed_c10d.FakeWork().boxed()
        found = read(func, args, kwargs)
        if found is not None:
            wait(str(func))
            return found
        try:
            made = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise DeviceError(f"the host waits for the device: {func} at {where()}") from error
        self._known.follow(func, args, kwargs, made)
        return made


def _check_index(func: Any, args: tuple) -> None:
    """The host waits for the places that a mask marks, unless one number fills them, and for an index of its own."""
    indices = [index for index in args[1] if index is not None]
    is_fill = func is not aten.index.Tensor and args[2].numel() == 1 and not isinstance(args[2], FakeTensor)
    if any(index.dtype in _MASKS for index in indices):
        if not is_fill:
            wait(f"{func} with a mask")
    elif any(not isinstance(index, FakeTensor) for index in indices):
        wait(f"{func} with an index of the host")


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
