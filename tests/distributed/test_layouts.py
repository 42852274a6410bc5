"""Every layout is the same model: losses, gradients, gradient norms and updated parameters equal one rank's."""

import functools

import pytest

from tests.oracle import IMAGE_ONLY, MIXED, TEXT_ONLY, TINY_IMAGE, Outcome, compare, run_steps
from tests.ranks import run_ranks
from tests.tolerances import RANKS

BATCH = (MIXED, TEXT_ONLY, IMAGE_ONLY, TINY_IMAGE)

LAYOUTS = {
    "tp2": (2, {"parallel": {"tp": 2}}),
    "tp2-sp": (2, {"parallel": {"tp": 2, "sequence_parallel": True}}),
    "tp2-sp-full-recompute": (
        2,
        {"parallel": {"tp": 2, "sequence_parallel": True}, "training": {"recompute": "full"}},
    ),
    "tp2-sp-selective-recompute": (
        2,
        {"parallel": {"tp": 2, "sequence_parallel": True}, "training": {"recompute": "selective"}},
    ),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "dp2": (2, {"optimizer": {"distributed": False}}),
    "tp2-sp-pp2": (4, {"parallel": {"tp": 2, "sequence_parallel": True, "pp": 2}}),
}


@functools.cache
def one_rank() -> Outcome:
    (outcome,) = run_ranks(1, run_steps, {}, BATCH)
    return outcome


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_rank(layout: str) -> None:
    world_size, sections = LAYOUTS[layout]
    compare(run_ranks(world_size, run_steps, sections, BATCH), one_rank(), **RANKS)
