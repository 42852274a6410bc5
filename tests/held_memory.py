"""What a forward pass holds for its backward pass: the distinct storages that autograd saves, parameters left out."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Held:
    """Storages saved while ``watching``."""

    def __init__(self, ignore: Iterable[Tensor]):
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in ignore}
        self.tensors: dict[int, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    def _note(self, tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self._ignored:
            # Keeping the tensor keeps its address from being given to another one.
            self.tensors.setdefault(pointer, tensor)
        return tensor


@contextmanager
def watching(ignore: Iterable[Tensor]) -> Iterator[Held]:
    """Storages that are saved inside, without those of the tensors to ignore."""
    held = Held(ignore)
    with torch.autograd.graph.saved_tensors_hooks(held._note, lambda tensor: tensor):
        yield held
