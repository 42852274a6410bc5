"""Whatever a batch holds and whichever rank holds it, a step comes back: every kind of row x rank x layout x recompute.

One session a layout runs all its cases under one hard limit; a hang shows as the ranks' stacks.
"""

import itertools
import math

import pytest

from navil_megatron.models.build import build_model
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step
from tests.distributed.test_layouts import LAYOUTS
from tests.oracle import (
    IMAGE_ONLY,
    MIXED,
    TEXT_ONLY,
    TINY_IMAGE,
    global_batch,
    global_loss,
    merge_sections,
    oracle_config,
)
from tests.ranks import run_ranks, start_session

LIMIT_SECONDS = 180
NO_SAMPLE = ()
KINDS = {"text": TEXT_ONLY, "image": IMAGE_ONLY, "mixed": MIXED, "tiny": TINY_IMAGE, "padding": NO_SAMPLE}
PLACES = (0, 3, None)
"""Rows of a batch of four that are of a kind; None: all of them."""
ALL_LAYOUTS = (
    "tp2",
    "tp2-sp",
    "pp2",
    "pp2-interleaved",
    "dp2-distributed-optimizer",
    "ep2",
    "tp2-sp-pp2",
    "ep2-tp2-sp",
    "cp2",
)
USUAL = {("tp2-sp-pp2", "none"), ("pp2-interleaved", "none"), ("ep2", "full"), ("cp2", "none")}
"""Every axis once; what is not named here is a slow test."""
ROWS = 4


def steps(rank: int, world_size: int, sections: dict) -> dict[str, tuple[float, float]]:
    """Loss and gradient norm of every case: one row of a kind among mixed ones, then all of that kind."""
    config = oracle_config(**sections)
    found = {}
    with start_session(rank, world_size, config) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        optimizer = build_optimizer(config, chunks, session)
        share = ROWS // session.groups.dp.size()
        for kind, composition in KINDS.items():
            for place in PLACES:
                rows = [composition if place in (None, number) else MIXED for number in range(ROWS)]
                batch = global_batch(config, tuple(rows), session)
                mine = batch[session.groups.dp.rank() * share : (session.groups.dp.rank() + 1) * share]
                result = train_step(config, session, chunks, optimizer, mine, lr=1e-3)
                for chunk in chunks:
                    assert all(p.main_grad is not None for p in chunk.parameters() if p.requires_grad)
                weight = float(result.loss_weight)
                found[f"{kind} at {place}"] = (global_loss(result, session) if weight else 0.0, result.grad_norm)
    return found


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        pytest.param(*case, marks=() if case in USUAL else pytest.mark.slow)
        for case in itertools.product(ALL_LAYOUTS, ("none", "full", "selective"))
    ],
)
def test_every_step_comes_back(layout: str, recompute: str) -> None:
    world_size, sections = LAYOUTS[layout]
    sections = merge_sections(sections, {"training": {"recompute": recompute}})
    for found in run_ranks(world_size, steps, sections, timeout=LIMIT_SECONDS):
        assert len(found) == len(KINDS) * len(PLACES)
        for case, (loss, grad_norm) in found.items():
            assert math.isfinite(loss) and math.isfinite(grad_norm), case
            # A batch of nothing but padding teaches nothing; every other one does.
            assert (grad_norm == 0) == (case == "padding at None"), case
