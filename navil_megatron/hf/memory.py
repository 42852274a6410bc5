"""Memory of a process that only converts, and the bytes of a tensor in it."""

import ctypes

import torch

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Lets this process use the memory of one tensor again for the next, where the C library is glibc.

    By default every large tensor is given back to the system when it is freed, and the next one waits while the system
    finds and clears new pages: longer than its bytes take to read.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(name, value)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in row-major order, in place, as they lie in files and are hashed."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
