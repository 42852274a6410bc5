"""Tensors packed into one buffer, and dataclasses whose tensors are exchanged."""

from dataclasses import dataclass

import numpy as np
import torch

from navil_megatron.runtime.upload import exchanged, pack, unpack, widest_first


@dataclass(frozen=True)
class Inner:
    order: torch.Tensor | None
    length: int


@dataclass(frozen=True)
class Outer:
    ids: torch.Tensor
    first: Inner
    second: Inner
    groups: tuple[Inner, ...]


def test_packed_tensors_come_back_as_they_were() -> None:
    tensors = [
        torch.arange(5),
        torch.tensor([True, False, True]),
        torch.zeros(0, dtype=torch.int64),
        torch.from_numpy(np.zeros(0, dtype=np.int64)),  # has stride 0: the images of a microbatch without any
        torch.randn(3, 2).T,
        torch.tensor(7, dtype=torch.int32),
        torch.arange(9, dtype=torch.uint8).view(3, 3),
    ]
    ordered = widest_first(tensors)
    assert sorted(map(id, ordered)) == sorted(map(id, tensors))
    packed = pack(ordered)
    assert packed.numel() == sum(tensor.nbytes for tensor in tensors)
    for view, tensor in zip(unpack(packed.clone(), ordered), ordered, strict=True):
        assert view.dtype == tensor.dtype
        assert torch.equal(view, tensor)
    assert pack([]).numel() == 0 and unpack(pack([]), []) == []


def test_tensors_are_exchanged_wherever_a_dataclass_holds_them() -> None:
    shared, groups = torch.arange(3), (Inner(None, 1),)
    tree = Outer(torch.ones(2), Inner(shared, 3), Inner(shared, 4), groups)
    seen: list[torch.Tensor] = []

    def change(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        return tensor + 1

    found = exchanged(tree, change)
    assert [id(tensor) for tensor in seen] == [id(tree.ids), id(shared), id(shared)]
    assert found.ids.tolist() == [2, 2] and found.first.order.tolist() == found.second.order.tolist() == [1, 2, 3]
    assert (found.first.length, found.second.length, found.groups) == (3, 4, groups)
    assert tree.ids.tolist() == [1, 1]
