"""Several experts of a modality in FP8, on one rank and sent to the ranks that hold them."""

import functools

import pytest

from tests.engine.conftest import Place
from tests.engine.runs import ENGINE, MIXED, TEXT_ONLY, Outcome, run_config, run_steps, whole
from tests.oracle import merge_sections
from tests.tolerances import FP8_LOSS

EXPERTS = {"model": {"language": {"num_experts": 4, "experts_per_token": 2}}}
STEPS = [[MIXED, TEXT_ONLY], [MIXED, MIXED]]


@functools.cache
def steps(place: Place, fp8: str, ep: int) -> list[Outcome]:
    changes = {"precision": {"fp8": fp8}, "parallel": {"expert_model_parallel_size": ep}}
    config = run_config(place.device, **merge_sections(merge_sections(ENGINE, EXPERTS), changes))
    return place.run(ep, run_steps, config, STEPS)


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("fp8", ["delayed", "tensorwise", "blockwise"])
def test_loss_follows_bf16(place: Place, fp8: str, ep: int) -> None:
    expected, found = steps(place, "none", ep), steps(place, fp8, ep)
    assert found[0].losses != expected[0].losses
    assert found[0].losses == pytest.approx(expected[0].losses, rel=FP8_LOSS)
    ours, theirs = whole(found, "weights"), whole(expected, "weights")
    assert ours.keys() == theirs.keys()
    assert all(weight.isfinite().all() for weight in ours.values())
