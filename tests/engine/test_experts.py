"""Several experts of a modality in FP8, on one rank and sent to the ranks that hold them."""

import pytest

from tests.engine.conftest import Place
from tests.engine.runs import ENGINE, MIXED, TEXT_ONLY, run_config, run_steps, whole
from tests.oracle import merge_sections
from tests.tolerances import FP8_LOSS

EXPERTS = {"model": {"language": {"num_experts": 4, "experts_per_token": 2}}}
STEPS = [[MIXED, TEXT_ONLY], [MIXED, MIXED]]


@pytest.mark.parametrize("parallel", [{}, {"expert_model_parallel_size": 2}], ids=["one rank", "ep2"])
@pytest.mark.parametrize("fp8", ["delayed", "tensorwise", "blockwise"])
def test_loss_follows_bf16(place: Place, fp8: str, parallel: dict) -> None:
    sections = merge_sections(merge_sections(ENGINE, EXPERTS), {"parallel": parallel})
    ranks = parallel.get("expert_model_parallel_size", 1)
    expected = place.run(ranks, run_steps, run_config(place.device, **sections), STEPS)
    found = place.run(
        ranks, run_steps, run_config(place.device, **merge_sections(sections, {"precision": {"fp8": fp8}})), STEPS
    )
    assert found[0].losses != expected[0].losses
    assert found[0].losses == pytest.approx(expected[0].losses, rel=FP8_LOSS)
    ours, theirs = whole(found, "weights"), whole(expected, "weights")
    assert ours.keys() == theirs.keys()
    assert all(weight.isfinite().all() for weight in ours.values())
