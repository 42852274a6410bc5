"""What a sweep costs, against the planner's count of every matrix, and that the chosen runs are the best to buy."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_megatron.blueprint.flops import forward_terms
from navil_megatron.blueprint.workload import Workload
from navil_megatron.config.errors import UserError
from navil_megatron.config.model import ModelConfig
from navil_megatron.scaling.cost import BACKWARD, CostAssumptions, run_hours, sample_flops
from navil_megatron.scaling.line import Line, grid_factor
from navil_megatron.scaling.sweep import Sweep, Wanted, plan_sweep
from tests.real_sizes import NAVIL_2B, NAVIL_9B

HALF = math.log(2) / 2
PAPER = Line((0.5e9, 1.8e9, 7e9), (0.3e9, 0.6e9, 1.2e9), ((HALF, HALF),) * 3)
LLMS = (0.5e9, 1e9, 1.8e9, 4e9, 7e9)


def sweep(budget: float, target: float = 8e9, is_measured: bool = False, **more: object) -> Sweep:
    wanted = Wanted(target=target, budget=budget, llms=LLMS, samples=(30e6, 120e6), **more)  # type: ignore[arg-type]
    return plan_sweep(PAPER, wanted, is_measured)


def test_more_money_is_never_worse() -> None:
    factors = [sweep(budget).plan.factor for budget in (6e3, 1e4, 2e4, 4e4)]
    assert factors == sorted(factors, reverse=True)


@settings(max_examples=10, deadline=None)
@given(budget=st.floats(2e3, 5e4), target=st.floats(1e9, 3e10), seeds=st.integers(1, 3))
def test_plans_keep_the_budget_and_say_what_they_reach(budget: float, target: float, seeds: int) -> None:
    found = sweep(budget, target, seeds=seeds)
    assert 0 < found.plan.gpu_hours <= budget
    llms = sorted({run.llm_parameters for run in found.plan.runs})
    sizes = {llm: {run.encoder_parameters for run in found.plan.runs if run.llm_parameters == llm} for llm in llms}
    halves = [HALF if len(sizes[llm]) == 4 else HALF / 2 for llm in llms]
    assert found.plan.factor == pytest.approx(math.exp(grid_factor(llms, halves, target)))
    assert all(plan.gpu_hours < found.plan.gpu_hours and plan.factor > found.plan.factor for plan in found.cheaper)
    assert all(
        len([run for run in found.plan.runs if (run.llm_parameters, run.encoder_parameters) == (llm, v)]) == seeds
        for llm in llms
        for v in sizes[llm]
    )


def test_a_study_is_added_to() -> None:
    found = sweep(1.2e3, is_measured=True)
    assert found.factor_before is not None and found.plan.factor < found.factor_before
    assert {run.llm_parameters for run in found.plan.runs} == {0.5e9}
    assert len(found.plan.runs) == 3


def test_a_small_budget_buys_less_data() -> None:
    assert sweep(2e4).plan.samples == 120e6
    assert sweep(2e4).also_at == (30e6,)
    assert sweep(1.5e3).plan.samples == 30e6


def test_too_small_a_budget_is_told_what_is_needed() -> None:
    with pytest.raises(UserError, match="expected at least") as told:
        sweep(10)
    needed = float(str(told.value).split("at least ")[1].split(";")[0].replace(",", ""))
    assert sweep(needed * 1.001).plan.runs


@pytest.mark.parametrize("model", [NAVIL_2B, NAVIL_9B])
def test_cost_agrees_with_the_planner(model: ModelConfig) -> None:
    """Within a tenth: the sweep's formula counts the embedding table as if it multiplied, but neither the LLM's own
    attention nor the connector.
    """
    assumed = CostAssumptions(visual_tokens=256, text_tokens=64)
    work = Workload(
        text_tokens=64,
        visual_tokens=256,
        segment_lengths=(320,),
        grids=((1, 32, 32),),
        num_predictions=64,
    )
    exact = sum(flops for _, flops in forward_terms(model, work)) * (1 + BACKWARD)
    encoder = 12.0 * model.vision.num_layers * model.vision.hidden_size**2
    llm = 1_889_110_016 if model is NAVIL_2B else 8_190_735_360
    assert sample_flops(llm, encoder, assumed) == pytest.approx(exact, rel=0.1)


def test_hours_follow_from_flops() -> None:
    assumed = CostAssumptions(tflops=1000, mfu=0.5)
    expected = 1e6 * sample_flops(1e9, 3e8, assumed) / (500e12 * 3600)
    assert run_hours(1e9, 3e8, 1e6, assumed) == pytest.approx(expected)
