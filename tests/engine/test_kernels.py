"""Transformer Engine's kernels against torch's in BF16 on one rank."""

import functools

import pytest

from tests.engine.conftest import Place
from tests.engine.runs import (
    ENGINE,
    FUSED_SUMS,
    MIXED,
    Outcome,
    assert_near,
    forward,
    run_config,
    run_steps,
    whole,
)
from tests.oracle import Composition, merge_sections
from tests.tolerances import BF16_KERNELS

ROWS = pytest.mark.parametrize("composition", [MIXED], ids=["mixed"])


@functools.cache
def torch_step(place: Place, composition: Composition) -> Outcome:
    (outcome,) = place.run(1, run_steps, run_config(place.device), [[composition]])
    return outcome


@ROWS
def test_outputs(place: Place, composition: Composition) -> None:
    (expected,) = place.run(1, forward, run_config(place.device), composition)
    (found,) = place.run(1, forward, run_config(place.device, **ENGINE), composition)
    assert_near(found, expected, BF16_KERNELS)


@ROWS
@pytest.mark.parametrize("sections", [ENGINE, FUSED_SUMS], ids=["engine", "fused-sums"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_one_step(place: Place, sections: dict, recompute: str, composition: Composition) -> None:
    expected = torch_step(place, composition)
    config = run_config(place.device, **merge_sections(sections, {"training": {"recompute": recompute}}))
    (found,) = place.run(1, run_steps, config, [[composition]])
    assert found.losses == pytest.approx(expected.losses, rel=BF16_KERNELS)
    assert_near(whole([found], "gradients"), whole([expected], "gradients"), BF16_KERNELS)
