"""Transformer Engine on several ranks, in BF16 and every recipe, against torch's kernels in BF16 on one."""

import functools

import pytest

from navil_megatron.config.precision import FP8_ROWS
from navil_megatron.config.run import NaViLConfig
from tests.engine.conftest import Place
from tests.engine.runs import (
    ENGINE,
    FAR,
    FUSED_SUMS,
    MIXED,
    PAD_TO,
    TEXT_ONLY,
    Outcome,
    assert_near,
    moved,
    run_config,
    run_steps,
    whole,
)
from tests.engine.test_kernels import start
from tests.oracle import merge_sections
from tests.tolerances import BF16_KERNELS, FP8_GRADIENTS, FP8_LOSS

BATCH = (MIXED, TEXT_ONLY)
"""Of two data-parallel ranks one has no image."""
SPLIT = {"optimizer": {"distributed": True}}
OVERLAP = {"optimizer": {"distributed": True, "overlap_grad_reduce": True, "overlap_param_gather": True}}
TP2_SP = {"tp": 2, "sequence_parallel": True}

ALL = ("none", "delayed", "tensorwise", "blockwise")

LAYOUTS: dict[str, tuple[int, dict, tuple[str, ...]]] = {
    "tp2": (2, {"parallel": {"tp": 2}}, ("none", "tensorwise")),
    "tp2-sp": (2, {"parallel": TP2_SP}, ALL),
    "tp2-sp-recompute": (2, {"parallel": TP2_SP, "training": {"recompute": "full"}}, ("delayed", "blockwise")),
    "pp2": (2, {"parallel": {"pp": 2}}, ("none", "blockwise")),
    "pp2-interleaved": (2, {"parallel": {"pp": 2, "vpp": 2}}, ("none", "delayed", "tensorwise")),
    "cp2": (2, {"parallel": {"cp": 2}}, ALL),
    "ep2": (2, {"parallel": {"ep": 2}}, ALL),
    "dp2": (2, {}, ("none", "delayed")),
    "dp2-overlap": (2, OVERLAP, ("none", "blockwise")),
    "tp2-sp-pp2": (4, {"parallel": {**TP2_SP, "pp": 2}}, ("none", "delayed")),
    "tp2-sp-ep2-split": (4, {"parallel": {**TP2_SP, "ep": 2}, **SPLIT}, ("none", "tensorwise")),
    "tp2-sp-cp2": (
        4,
        {"parallel": {**TP2_SP, "cp": 2}, "model": {"language": {"num_query_groups": 4}}},
        ("none", "blockwise"),
    ),
}
"""Ranks, sections, and the recipes that run there: each way of a recipe to talk to other ranks is in one of them."""
ADDED_IN_PRODUCTS = ("none", "blockwise")
"""Recipes that run with the fusion of gradient sums."""


def config_of(place: Place, layout: str, fp8: str) -> NaViLConfig:
    _, sections, _ = LAYOUTS[layout]
    rows = FP8_ROWS.get(fp8, PAD_TO) * sections.get("parallel", {}).get("cp", 1)
    engine = FUSED_SUMS if fp8 in ADDED_IN_PRODUCTS else ENGINE
    # The ranks of context parallelism each take whole blocks of both modalities.
    data = {"pad_segments_to": rows, "seq_length": 2 * max(rows, PAD_TO)}
    run = {"precision": {"fp8": fp8}, "data": data, "optimizer": FAR}
    return run_config(place.device, **merge_sections(merge_sections(engine, run), sections))


@functools.cache
def one_rank(place: Place, groups: int) -> Outcome:
    sections = {"model": {"language": {"num_query_groups": groups}}, "optimizer": FAR}
    (outcome,) = place.run(1, run_steps, run_config(place.device, **sections), [BATCH])
    return outcome


@pytest.mark.parametrize(
    ("layout", "fp8"), [(layout, fp8) for layout, (_, _, recipes) in LAYOUTS.items() for fp8 in recipes]
)
def test_layout(place: Place, layout: str, fp8: str) -> None:
    config = config_of(place, layout, fp8)
    found = place.run(LAYOUTS[layout][0], run_steps, config, [BATCH])
    expected = one_rank(place, config.model.language.num_query_groups)
    limit = BF16_KERNELS if fp8 == "none" else FP8_GRADIENTS
    for outcome in found:
        assert outcome.losses == pytest.approx(expected.losses, rel=FP8_LOSS)
        assert outcome.grad_norms == pytest.approx(expected.grad_norms, rel=limit)
    if found[0].gradients:
        assert_near(whole(found, "gradients"), whole([expected], "gradients"), limit)
    else:
        # Each rank has only its piece of the gradients, so what they moved speaks for them.
        assert_near(moved([start(place)], found), moved([start(place)], [expected]), limit)
