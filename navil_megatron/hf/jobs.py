"""What a conversion does, as data: jobs that each read a few tensors, rearrange them, and write a few others.

A job is small (one layer of one parameter), needs nothing of another job, and pickles, so that a conversion of any
size streams through bounded memory and its jobs can be dealt to several processes.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from navil_megatron.config.errors import UserError
from navil_megatron.config.model import ModelConfig
from navil_megatron.hf.hf_parameters import Slot, hf_parameters
from navil_megatron.hf.transforms import Tensors
from navil_megatron.hf.verify import WEIGHT_TYPE_NAMES, WEIGHT_TYPES, Signature, type_name


@dataclass(frozen=True, slots=True)
class Job:
    """The smallest unit of a conversion."""

    sources: tuple[Slot, ...]
    """What is read; empty for tensors that are drawn at random."""
    targets: tuple[Slot, ...]
    """What is written."""
    function: Callable[[Tensors], Tensors]
    """Source tensors in order -> target tensors in order. Pickles; no arithmetic unless the job starts new weights."""
    dtype: torch.dtype | None = None
    """Type of the targets; ``None``: that of the sources."""


def export_jobs(model: ModelConfig) -> list[Job]:
    """From a checkpoint to a Hugging Face folder, in the order in which the folder holds its tensors."""
    return [
        Job((ours,), theirs, partial(found.transform.to_hf, model=model))
        for found in hf_parameters(model)
        for ours, theirs in found.slots(model)
    ]


def ingest_jobs(model: ModelConfig) -> list[Job]:
    """From a NaViL folder to a checkpoint."""
    return [
        Job(theirs, (ours,), partial(found.transform.to_mcore, model=model))
        for found in hf_parameters(model)
        for ours, theirs in found.slots(model)
    ]


def with_types(jobs: Sequence[Job], found: Mapping[str, Signature], dtype: torch.dtype | None) -> list[Job]:
    """The jobs with the type of their targets filled in: ``dtype``, else what the job says, else that of its sources.

    Raises:
        UserError: Weights cannot have such a type.
    """
    if dtype is not None and dtype not in WEIGHT_TYPES:
        raise UserError(f"dtype {type_name(dtype)} is not supported, only {WEIGHT_TYPE_NAMES}")
    typed = []
    for job in jobs:
        kind = dtype or job.dtype or found[job.sources[0].key][1]
        if isinstance(kind, str):
            raise UserError(f"{job.sources[0].key} has type {kind}, which is not supported")
        typed.append(replace(job, dtype=kind))
    return typed


def targets(jobs: Iterable[Job]) -> list[tuple[Slot, torch.dtype]]:
    """Every tensor that typed jobs write, with its type."""
    return [(slot, job.dtype) for job in jobs for slot in job.targets if job.dtype is not None]


def total_bytes(jobs: Iterable[Job]) -> int:
    """Bytes of every tensor that typed jobs write."""
    return sum(slot.num_bytes(dtype) for slot, dtype in targets(jobs))


def summary(jobs: Iterable[Job]) -> dict[str, Any]:
    """What typed jobs write to a checkpoint, as counts for a report."""
    written = targets(jobs)
    return {
        "num_tensors": len({slot.key for slot, _ in written}),
        "num_parameters": sum(math.prod(slot.shape) for slot, _ in written),
        "num_bytes": sum(slot.num_bytes(dtype) for slot, dtype in written),
        "types": sorted({type_name(dtype) for _, dtype in written}),
    }


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
