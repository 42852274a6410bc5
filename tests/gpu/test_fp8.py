"""FP8 by every recipe of Hopper: 200 steps beside BF16; a row without a modality, frozen experts, resume."""

from functools import cache
from pathlib import Path
from statistics import fmean

import pytest
import torch

from navil_megatron.data.types import Microbatch
from tests.gpu.runs import ENGINE, MIXED, TEXT_ONLY, Outcome, distance, gpu_config, row, run
from tests.oracle import merge_sections
from tests.tolerances import BF16_KERNELS, FP8_LOSS

pytestmark = pytest.mark.gpu
STEPS, WINDOW = 200, 20
RECIPES = ["delayed", "tensorwise", "blockwise"]
KEPT = {"fp8": "tensorwise", "fp8_first_last_layers_bf16": True}
ENCODER = {"fp8": "tensorwise", "fp8_encoder": True}


def sections(fields: dict[str, object], **training: object) -> dict:
    return merge_sections(ENGINE, {"precision": fields, "training": training})


@cache
def rows() -> list[Microbatch]:
    """Eight rows over and over: enough to learn by heart for a while, so that the loss falls."""
    return [row(MIXED if number % 4 else TEXT_ONLY, number) for number in range(8)]


def run_long(folder: Path, **fields: object) -> Outcome:
    return run(gpu_config(**sections(fields)), (rows() * STEPS)[:STEPS], folder)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return run_long(tmp_path_factory.mktemp("bf16")).losses


def windows(losses: list[float]) -> list[float]:
    """Means over stretches of steps."""
    return [fmean(losses[start : start + WINDOW]) for start in range(0, STEPS, WINDOW)]


@pytest.mark.parametrize(
    "fields", [*({"fp8": recipe} for recipe in RECIPES), KEPT, ENCODER], ids=[*RECIPES, "first-last-bf16", "encoder"]
)
def test_loss_follows_bf16(tmp_path: Path, bf16: list[float], fields: dict) -> None:
    found = run_long(tmp_path, **fields).losses
    assert found != bf16, "the run was not in FP8"
    assert windows(bf16)[-1] < 0.95 * windows(bf16)[0]
    assert windows(found) == pytest.approx(windows(bf16), rel=FP8_LOSS)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_no_visual_token(tmp_path: Path, recipe: str, recompute: str) -> None:
    found = run(gpu_config(**sections({"fp8": recipe}, recompute=recompute)), [row(TEXT_ONLY), row(MIXED)], tmp_path)
    assert all(torch.isfinite(torch.tensor(found.losses)))
    visual = [name for name in found.gradients if ".visual." in name]
    assert visual and not any(found.gradients[name].any() for name in visual)
    assert all(gradient.isfinite().all() for gradient in found.gradients.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_frozen_text_experts(tmp_path: Path, recipe: str) -> None:
    """The visual experts' gradients are those of a run that trains everything."""
    whole = run(gpu_config(**sections({"fp8": recipe})), [row(MIXED)], tmp_path)
    found = run(gpu_config(**sections({"fp8": recipe}, phase="s1.1")), [row(MIXED)], tmp_path)
    assert not any(".text." in name for name in found.gradients)
    assert found.losses == pytest.approx(whole.losses, rel=FP8_LOSS)
    for name, gradient in found.gradients.items():
        assert distance(gradient, whole.gradients[name]) <= BF16_KERNELS, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_resume(tmp_path: Path, recipe: str) -> None:
    """Scales are made again after a restore, those of ``delayed`` from 1 on."""
    config = gpu_config(**sections({"fp8": recipe}))
    straight = run(config, (rows() * 2)[:12], tmp_path).losses[8:]
    run(config, rows(), tmp_path, save=tmp_path / "checkpoint")
    resumed = run(config, rows()[:4], tmp_path, restore=tmp_path / "checkpoint").losses
    assert resumed == pytest.approx(straight, rel=FP8_LOSS)
