"""Memory of a GPU that is not there: bytes of all tensors that are alive, and what they were when they were most."""

import weakref
from collections import Counter
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from navil_megatron.runtime.host_waits import where

_BLOCK_BYTES = 512
"""What torch's allocator hands out is a multiple of this."""


class LiveBytes:
    """Observer of a ``FakeGPU``. Memory inside kernels is not seen."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}
        self._changes: list[tuple[str, int]] = []
        """Line that made a storage, and its bytes; negative when it goes."""
        self._changes_to_peak = 0

    def __call__(self, func: Any, args: tuple, kwargs: dict[str, Any], made: Any) -> None:
        """Counts the storages of what an operation gave."""
        for tensor in made if isinstance(made, list | tuple) else (made,):
            if isinstance(tensor, FakeTensor):
                self._count(tensor)

    def forget_peak(self) -> None:
        """From here on, the peak is that of what follows."""
        self.peak, self._changes_to_peak = self.now, len(self._changes)

    def of(self, tensors: Any) -> int:
        """Bytes of the storages of some tensors."""
        return sum({tensor.untyped_storage()._cdata: _size(tensor) for tensor in tensors}.values())

    def at_peak(self) -> Counter[str]:
        """What was alive at the peak, by the line that made it."""
        found: Counter[str] = Counter()
        for line, num_bytes in self._changes[: self._changes_to_peak]:
            found[line] += num_bytes
        return +found

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        num_bytes, line = _size(tensor), where()
        self._storages[key] = weakref.ref(storage, lambda _: self._free(key, num_bytes, line))
        self._change(line, num_bytes)
        if self.now > self.peak:
            self.forget_peak()

    def _free(self, key: int, num_bytes: int, line: str) -> None:
        del self._storages[key]
        self._change(line, -num_bytes)

    def _change(self, line: str, num_bytes: int) -> None:
        self.now += num_bytes
        self._changes.append((line, num_bytes))


def _size(tensor: Tensor) -> int:
    return -(-tensor.untyped_storage().nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES
