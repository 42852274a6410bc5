"""Dataclasses of tensors from the host to a GPU, beside the work that runs there."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


class Uploader:
    """Copies on a stream of its own. What is pinned goes as it is, other host tensors together in one pinned buffer."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.Stream(device=device)

    def start(self, tree: Any) -> Callable[[], Any]:
        """Starts to copy; call what comes back where the caller's stream is to have the tensors."""
        found: dict[int, Tensor] = {}

        def note(tensor: Tensor) -> Tensor:
            if tensor.device.type == "cpu":
                found[id(tensor)] = tensor
            return tensor

        exchanged(tree, note)
        alone = [tensor for tensor in found.values() if tensor.is_pinned()]
        together = widest_first(tensor for tensor in found.values() if not tensor.is_pinned())
        with self._stream:
            copies = [tensor.to(self._device, non_blocking=True) for tensor in (*alone, pack(together).pin_memory())]
        arrived = self._stream.record_event()

        def take() -> Any:
            current = torch.accelerator.current_stream(self._device)
            current.wait_event(arrived)
            for copy in copies:
                # Else its memory is given to the next copy while this stream still reads it.
                copy.record_stream(current)
            *whole, packed = copies
            moved = zip((*alone, *together), (*whole, *unpack(packed, together)), strict=True)
            on_device = {id(tensor): copy for tensor, copy in moved}
            return exchanged(tree, lambda tensor: on_device.get(id(tensor), tensor))

        return take


def widest_first(tensors: Iterable[Tensor]) -> list[Tensor]:
    """In the order in which they are packed: each then begins at a multiple of the bytes of its numbers."""
    return sorted(tensors, key=Tensor.element_size, reverse=True)


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """[bytes] uint8: tensors, widest first, one after the other."""
    # An empty array of NumPy has no stride by which to view it as bytes.
    bytes_of = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors if tensor.numel()]
    return torch.cat([torch.empty(0, dtype=torch.uint8), *bytes_of])


def unpack(packed: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of a packed buffer, or of its copy, that are shaped like what went into it."""
    pieces = packed.split([tensor.nbytes for tensor in tensors])
    return [piece.view(tensor.dtype).view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def exchanged(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass with every tensor in its fields, and in those of dataclasses there, changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if not is_dataclass(tree) or isinstance(tree, type):
        return tree
    parts = {field.name: getattr(tree, field.name) for field in fields(tree)}
    return replace(tree, **{name: exchanged(part, change) for name, part in parts.items()})
