"""What a conversion does, as data: steps that each read a few tensors, rearrange them, and write a few others.

A step is small (one layer of one parameter), needs nothing of another step, and pickles, so that a conversion of any
size streams through bounded memory and its steps can be dealt to several processes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from navil_megatron.blueprint.parameters import Parameter, Shape
from navil_megatron.config.model import ModelConfig
from navil_megatron.hf.param_map import table
from navil_megatron.hf.transforms import TRANSFORMS, Tensors


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one tensor, on either side of a conversion."""

    key: str
    """Hugging Face key, or key of the checkpoint."""
    shape: Shape
    """Shape of this tensor; for one layer of a stacked parameter without the layer axis."""
    layer: int | None = None
    """Index on axis 0 of the stacked parameter ``key`` of a checkpoint; ``None``: the whole tensor."""
    num_layers: int | None = None
    """Layers that the stacked parameter holds."""

    @property
    def name(self) -> str:
        """What messages and checksums call it: ``key`` or ``key[layer]``."""
        return self.key if self.layer is None else f"{self.key}[{self.layer}]"

    @property
    def num_elements(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Step:
    """The smallest unit of a conversion."""

    sources: tuple[Slot, ...]
    """What is read; empty for tensors that are drawn at random."""
    targets: tuple[Slot, ...]
    """What is written."""
    function: Callable[[Tensors], Tensors]
    """Source tensors in order -> target tensors in order. Pickles; no arithmetic unless the step starts new weights."""
    dtype: torch.dtype | None = None
    """Type of the targets; ``None``: that of the sources."""


def checkpoint_slot(row: Parameter, layer: int) -> Slot:
    """Where one layer of a parameter lies in a checkpoint; all of it, if it exists once."""
    return Slot(row.key, row.shape, None if row.num_layers is None else layer, row.num_layers)


def plan_export(model: ModelConfig) -> list[Step]:
    """The steps from a checkpoint to a Hugging Face folder, in the order in which the folder holds its tensors."""
    return [Step((ours,), theirs, partial(_to_hf, transform=name, model=model)) for name, ours, theirs in _pairs(model)]


def plan_ingest(model: ModelConfig) -> list[Step]:
    """The steps from a NaViL folder to a checkpoint."""
    return [
        Step(theirs, (ours,), partial(_to_mcore, transform=name, model=model)) for name, ours, theirs in _pairs(model)
    ]


def num_bytes(slot: Slot, dtype: torch.dtype) -> int:
    """Bytes of a tensor in a type."""
    return slot.num_elements * dtype.itemsize


def cut[K](sizes: Mapping[K, int], most: int) -> list[list[K]]:
    """The keys in order, cut into pieces of at most so many bytes each; a larger one gets a piece of its own."""
    pieces: list[list[K]] = []
    filled = 0
    for key, size in sizes.items():
        if not pieces or filled + size > most:
            pieces.append([])
            filled = 0
        pieces[-1].append(key)
        filled += size
    return pieces


def _pairs(model: ModelConfig) -> list[tuple[str, Slot, tuple[Slot, ...]]]:
    """Transform, slot in the checkpoint and slots in the folder, of every layer of every parameter."""
    return [
        (
            row.transform,
            checkpoint_slot(row.parameter, layer),
            tuple(Slot(key, shape) for key, shape in zip(keys, row.hf_shapes(model), strict=True)),
        )
        for row in table(model)
        for layer, keys in enumerate(row.hf_keys_of_layers())
    ]


def _to_hf(tensors: Tensors, *, transform: str, model: ModelConfig) -> Tensors:
    (tensor,) = tensors
    return TRANSFORMS[transform].to_hf(tensor, model)


def _to_mcore(tensors: Tensors, *, transform: str, model: ModelConfig) -> Tensors:
    return (TRANSFORMS[transform].to_mcore(tensors, model),)
