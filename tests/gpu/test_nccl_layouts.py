"""Layouts of two GPUs over NCCL equal one GPU; skipped on a machine with one."""

import functools
from typing import Any

import pytest
import torch

from tests.distributed.test_layouts import BATCH, LAYOUTS
from tests.oracle import Outcome, compare, merge_sections, run_steps
from tests.ranks import run_ranks
from tests.tolerances import RANKS_ON_GPUS

ON_GPU: dict[str, dict[str, Any]] = {"runtime": {"device": "cuda"}}
OF_TWO = ("tp2", "tp2-sp", "pp2", "pp2-interleaved", "dp2-distributed-optimizer", "cp2", "cp2-full-recompute", "ep2")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def steps(rank: int, world_size: int, sections: dict) -> Outcome:
    """What ``run_steps`` found, on the host."""
    outcome = run_steps(rank, world_size, sections, BATCH)
    for found in (outcome.gradients, outcome.parameters):
        found[:] = [(*where, values.cpu()) for *where, values in found]
    return outcome


@functools.cache
def one_gpu() -> Outcome:
    (outcome,) = run_ranks(1, steps, ON_GPU)
    return outcome


@pytest.mark.parametrize("layout", OF_TWO)
def test_two_gpus_equal_one(layout: str) -> None:
    world_size, sections = LAYOUTS[layout]
    compare(run_ranks(world_size, steps, merge_sections(sections, ON_GPU)), one_gpu(), **RANKS_ON_GPUS)
