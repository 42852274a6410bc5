"""FP8 by every recipe of Hopper on one rank: against BF16, with recompute, frozen experts, fused sums, resume."""

import functools
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from navil_megatron.config.run import NaViLConfig
from tests.engine.conftest import Place
from tests.engine.runs import ENGINE, FUSED_SUMS, MIXED, Outcome, assert_near, run_config, run_steps, whole
from tests.engine.test_kernels import RECOMPUTE
from tests.oracle import merge_sections
from tests.tolerances import BF16_KERNELS, FP8_GRADIENTS, FP8_LOSS

CHOICES: dict[str, dict[str, object]] = {
    "delayed": {"fp8": "delayed"},
    "tensorwise": {"fp8": "tensorwise"},
    "blockwise": {"fp8": "blockwise"},
    "first-last-bf16": {"fp8": "tensorwise", "fp8_first_last_layers_bf16": True},
    "tensorwise-encoder": {"fp8": "tensorwise", "fp8_encoder": True},
    "blockwise-encoder": {"fp8": "blockwise", "fp8_encoder": True},
}
RECIPES = list(CHOICES)[:3]
STEP_AND_NEXT = [[MIXED, MIXED], [MIXED]]
"""The second step runs in the scales that the first left."""
STEPS = {"cpu": 12, "cuda": 200}
NUM_WINDOWS = 3


def fp8_config(place: Place, choice: str, **sections: dict) -> NaViLConfig:
    return run_config(place.device, **merge_sections(ENGINE, {**sections, "precision": CHOICES[choice]}))


def two_steps(place: Place, config: NaViLConfig) -> Outcome:
    (outcome,) = place.run(1, run_steps, config, STEP_AND_NEXT)
    return outcome


@functools.cache
def whole_steps(place: Place, choice: str) -> Outcome:
    """Everything is trained, nothing recomputed; ``torch``: by torch's kernels in BF16."""
    config = run_config(place.device) if choice == "torch" else fp8_config(place, choice)
    return two_steps(place, config)


@functools.cache
def learning(place: Place, choice: str) -> list[float]:
    """Losses of steps on fresh rows; ``bf16``: by the engine without FP8."""
    config = run_config(place.device, **ENGINE) if choice == "bf16" else fp8_config(place, choice)
    (outcome,) = place.run(1, run_steps, config, [[MIXED]] * STEPS[place.device])
    return outcome.losses


def windows(losses: list[float]) -> list[float]:
    """Means over stretches of steps."""
    return [fmean(part) for part in np.array_split(losses, NUM_WINDOWS)]


@pytest.mark.parametrize("choice", CHOICES)
def test_one_step(place: Place, choice: str) -> None:
    """Loss and gradients against torch's kernels in BF16."""
    expected, found = whole_steps(place, "torch"), whole_steps(place, choice)
    assert found.losses == pytest.approx(expected.losses, rel=FP8_LOSS)
    assert_near(whole([found], "gradients"), whole([expected], "gradients"), FP8_GRADIENTS)
    assert found.losses != expected.losses
    if place.device == "cpu":
        assert found.calls["quantize"] > 0


@pytest.mark.parametrize("choice", [*RECIPES, "tensorwise-encoder"])
def test_loss_follows_bf16(place: Place, choice: str) -> None:
    """Over steps that learn what holds for every row, each on rows that were not seen before."""
    expected, found = (windows(learning(place, name)) for name in ("bf16", choice))
    assert expected[-1] < 0.7 * expected[0]
    assert found == pytest.approx(expected, rel=FP8_LOSS)


@pytest.mark.parametrize(
    ("choice", "recompute"), [pair for pair in product(RECIPES, RECOMPUTE) if pair != ("delayed", "mlp")]
)
def test_recompute_changes_nothing(place: Place, choice: str, recompute: str) -> None:
    expected = whole_steps(place, choice)
    found = two_steps(place, fp8_config(place, choice, training=RECOMPUTE[recompute]))
    assert found.losses == expected.losses
    assert_near(whole([found], "gradients"), whole([expected], "gradients"), 0)


@pytest.mark.parametrize("choice", RECIPES)
def test_fused_sums(place: Place, choice: str) -> None:
    """Weight gradients added inside the product are those that are added behind it, but for a rounding to BF16."""
    expected = whole_steps(place, choice)
    found = two_steps(place, fp8_config(place, choice, **FUSED_SUMS))
    assert found.losses[0] == expected.losses[0]
    assert found.losses[1] == pytest.approx(expected.losses[1], rel=FP8_LOSS)
    assert_near(whole([found], "gradients"), whole([expected], "gradients"), BF16_KERNELS)


@pytest.mark.parametrize("choice", RECIPES)
def test_frozen_text_experts(place: Place, choice: str) -> None:
    """The visual experts' gradients are those of a run that trains everything."""
    expected = whole([whole_steps(place, choice)], "gradients")
    found = whole([two_steps(place, fp8_config(place, choice, training={"phase": "s1.1"}))], "gradients")
    assert found and not any(".text." in name for name in found)
    assert_near(found, {name: expected[name] for name in found}, BF16_KERNELS)


@pytest.mark.parametrize("choice", RECIPES)
def test_resume(place: Place, tmp_path: Path, choice: str) -> None:
    """Scales are made again after a restore, those of ``delayed`` from 1 on."""
    config = fp8_config(place, choice)
    place.run(1, run_steps, config, [[MIXED]] * 2, None, tmp_path / "checkpoint")
    (resumed,) = place.run(1, run_steps, config, [[MIXED]] * 2, tmp_path / "checkpoint")
    (in_bf16,) = place.run(1, run_steps, run_config(place.device, **ENGINE), [[MIXED]] * 2, tmp_path / "checkpoint")
    assert resumed.step == 4
    assert resumed.losses == pytest.approx(in_bf16.losses, rel=FP8_LOSS)
