"""A tensor as the bytes that lie in files and are hashed."""

import torch


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in row-major order, in place."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
