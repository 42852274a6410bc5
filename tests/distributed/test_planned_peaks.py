"""Planned peak memory of each stage against what the tensors of a whole step hold: both models at their real sizes."""

import pytest

from navil_megatron.config.run import NaViLConfig
from navil_megatron.dry_step import SteppedRank, step_ranks
from tests.ranks import run_ranks
from tests.tolerances import PLANNED_FLOPS, PLANNED_PEAK
from tools.bench.planned_peaks import LAYOUTS, MODELS, run_at, with_layers


def stepped(_rank: int, _world_size: int, config: NaViLConfig, gpus: int) -> list[SteppedRank]:
    return list(step_ranks(config, gpus, text_tokens=256, image_side=1024))


def check(config: NaViLConfig, gpus: int, timeout: float) -> None:
    (steps,) = run_ranks(1, stepped, config, gpus, timeout=timeout)
    for step in steps:
        state = step.weights + step.gradients + step.optimizer
        expected = step.expected
        lines = "\n".join(f"{num_bytes:16,} {line}" for line, num_bytes in step.largest.most_common(20))
        of_state = expected.weights + expected.gradients + expected.optimizer
        assert of_state == pytest.approx(state, rel=0.001), step
        # State is most of the peak, and would hide what activations are wrong.
        assert expected.peak - of_state == pytest.approx(step.peak - state, rel=PLANNED_PEAK), f"{expected}\n{lines}"
        assert step.expected_flops == pytest.approx(step.flops, rel=PLANNED_FLOPS)


@pytest.mark.parametrize(
    ("model", "layout", "layers"), [("navil_9b", "tp2-sp-pp2-interleaved", 4), ("navil_2b", "dp8, full recompute", 2)]
)
def test_a_few_layers_hold_what_is_planned(model: str, layout: str, layers: int) -> None:
    config, gpus = run_at(model, layout)
    check(with_layers(config, layers), gpus, timeout=180)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_whole_models_hold_what_is_planned(model: str, layout: str) -> None:
    check(*run_at(model, layout), timeout=1800)
