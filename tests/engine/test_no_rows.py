"""Nothing to compute: rows without an image, and each piece of the engine without a single row."""

import functools

import pytest

from tests.engine.conftest import Place
from tests.engine.runs import ENGINE, MIXED, TEXT_ONLY, Outcome, assert_near, run_config, run_steps, whole
from tests.oracle import merge_sections
from tests.tolerances import BF16_KERNELS, FP8_LOSS

RECIPES = ["none", "delayed", "tensorwise", "blockwise"]
STEPS = [[TEXT_ONLY, TEXT_ONLY], [MIXED, TEXT_ONLY]]


@functools.cache
def plain(place: Place) -> Outcome:
    (outcome,) = place.run(1, run_steps, run_config(place.device), STEPS)
    return outcome


@pytest.mark.parametrize("fp8", RECIPES)
def test_a_step_on_text_alone(place: Place, fp8: str) -> None:
    """Losses of plain torch, zero gradients of all that is visual, and nothing left behind for the next step."""
    expected = plain(place)
    precision = {"fp8": fp8, "fp8_encoder": fp8 in ("tensorwise", "blockwise")}
    config = run_config(place.device, **merge_sections(ENGINE, {"precision": precision}))
    (found,) = place.run(1, run_steps, config, STEPS)
    assert found.losses == pytest.approx(expected.losses, rel=FP8_LOSS)
    gradients = whole([found], "gradients")
    visual = [name for name in gradients if ".visual." in name or name.startswith(("vision_encoder.", "connector."))]
    assert len(visual) > 20
    assert not any(gradients[name].any() for name in visual)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    if fp8 == "none":
        assert_near(gradients, whole([expected], "gradients"), BF16_KERNELS)
