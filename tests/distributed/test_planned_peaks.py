"""Planned peak memory of each stage against what the tensors of a whole step hold: both models at their real sizes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from navil_megatron.config.load import load_config
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.validate import validate
from navil_megatron.dry_step import SteppedRank, step_ranks
from tests.ranks import run_ranks
from tests.tolerances import PLANNED_FLOPS, PLANNED_PEAK

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = ("navil_2b", "navil_9b")
SP = {"sequence_parallel": True}
FULL, ENCODER = {"recompute": "full"}, {"recompute": "selective", "recompute_modules": ("encoder",)}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "dp8, full recompute": (8, {}, FULL),
    "tp2-dp2": (4, {"tensor_model_parallel_size": 2}, ENCODER),
    "tp2-sp": (2, {"tensor_model_parallel_size": 2, **SP}, {"recompute": "none"}),
    "tp4-sp, attention and mlp again": (
        4,
        {"tensor_model_parallel_size": 4, **SP},
        {"recompute": "selective", "recompute_modules": ("attention", "mlp")},
    ),
    "tp4-sp-dp2": (8, {"tensor_model_parallel_size": 4, **SP}, {"recompute": "none"}),
    "tp2-sp-pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, **SP}, ENCODER),
    "pp4, full recompute": (4, {"pipeline_model_parallel_size": 4}, FULL),
    "tp2-sp-pp2-interleaved": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            **SP,
        },
        {"recompute": "selective", "recompute_modules": ("encoder", "mlp")},
    ),
    "tp2-sp-cp2": (4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2, **SP}, ENCODER),
    "ep2": (2, {"expert_model_parallel_size": 2}, ENCODER),
    "tp2-sp-ep2": (4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, **SP}, ENCODER),
}
"""GPUs, and what differs in ``[parallel]`` and ``[training]``."""


def run_at(model: str, layout: str) -> tuple[NaViLConfig, int]:
    """Stage 2 of a recipe at another layout."""
    gpus, parallel, training = LAYOUTS[layout]
    config = load_config(EXAMPLES / model / "stage2.toml")
    alone = {"tensor_model_parallel_size": 1, "sequence_parallel": False}
    modules = {"recompute_modules": ()}
    config = replace(
        config,
        parallel=replace(config.parallel, **{**alone, **parallel}),
        training=replace(config.training, **{**modules, **training}),
    )
    validate(config, gpus)
    return config, gpus


def with_layers(config: NaViLConfig, num_layers: int) -> NaViLConfig:
    """As wide, with fewer layers in encoder and decoder."""
    language, vision = config.model.language, config.model.vision
    model = replace(
        config.model,
        language=replace(language, num_layers=num_layers),
        vision=replace(vision, num_layers=num_layers),
    )
    return replace(config, model=model)


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
    ("model", "layout"), [("navil_9b", "tp2-sp-pp2-interleaved"), ("navil_2b", "tp4-sp, attention and mlp again")]
)
def test_a_few_layers_hold_what_is_planned(model: str, layout: str) -> None:
    config, gpus = run_at(model, layout)
    check(with_layers(config, 4), gpus, timeout=180)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_whole_models_hold_what_is_planned(model: str, layout: str) -> None:
    check(*run_at(model, layout), timeout=1800)
