"""Random number generators of a rank: seeding them, and carrying their state through a checkpoint.

Ranks of one tensor-parallel group share the default generator and differ in core's model-parallel one, so replicated
weights start equal and split weights do not repeat each other.
"""

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

_STAGE_STRIDE = 100  # distance between the seeds of neighbouring pipeline stages, as in Megatron-LM


def seed_rank(seed: int, pipeline_rank: int) -> None:
    """Seeds Python, NumPy, torch and core's model-parallel generators of this rank."""
    stage_seed = seed + _STAGE_STRIDE * pipeline_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def rng_state() -> dict[str, Any]:
    """State of every generator of this rank, as numbers, lists and tensors: what ``weights_only`` loading allows."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "model_parallel": get_cuda_rng_tracker().get_states(),
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Puts every generator of this rank back to a state that ``rng_state`` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["model_parallel"])
