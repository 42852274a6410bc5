"""Transformer Engine's kernels against torch's in BF16: outputs, gradients, an update, checkpoints both ways."""

from pathlib import Path

import pytest
import torch

from navil_megatron.kernels.adamw import AdamW
from tests.gpu.runs import ENGINE, MIXED, TEXT_ONLY, distance, forward, gpu_config, row, run
from tests.oracle import Composition, merge_sections
from tests.tolerances import BF16_KERNELS, BF16_KERNELS_WEIGHTS, FUSED_ADAM

pytestmark = pytest.mark.gpu
FUSED_SUMS = {"runtime": {"kernels": "transformer_engine", "gradient_accumulation_fusion": "transformer_engine"}}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float) -> None:
    assert found.keys() == expected.keys()
    far = {name: distance(found[name], expected[name]) for name in expected}
    assert {name: value for name, value in far.items() if not value <= limit} == {}


@pytest.mark.parametrize("composition", [MIXED, TEXT_ONLY], ids=["mixed", "no-visual-token"])
def test_outputs(tmp_path: Path, composition: Composition) -> None:
    expected = forward(gpu_config(), row(composition), tmp_path)
    assert_near(forward(gpu_config(**ENGINE), row(composition), tmp_path), expected, BF16_KERNELS)


@pytest.mark.parametrize("composition", [MIXED, TEXT_ONLY], ids=["mixed", "no-visual-token"])
@pytest.mark.parametrize("sections", [ENGINE, FUSED_SUMS], ids=["engine", "fused-sums"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_one_step(tmp_path: Path, sections: dict, recompute: str, composition: Composition) -> None:
    expected = run(gpu_config(), [row(composition)], tmp_path)
    config = gpu_config(**merge_sections(sections, {"training": {"recompute": recompute}}))
    found = run(config, [row(composition)], tmp_path)
    assert found.losses == pytest.approx(expected.losses, rel=BF16_KERNELS)
    assert_near(found.gradients, expected.gradients, BF16_KERNELS)
    assert_near(found.weights, expected.weights, BF16_KERNELS_WEIGHTS)
    if composition is TEXT_ONLY:
        visual = [name for name in found.gradients if ".visual." in name or name.startswith("vision_encoder.")]
        assert visual and not any(found.gradients[name].any() for name in visual)


@pytest.mark.parametrize("sections", [ENGINE, FUSED_SUMS], ids=["engine", "fused-sums"])
def test_frozen_text_experts(tmp_path: Path, sections: dict) -> None:
    """Phase s1.1 trains the visual experts: the text ones have no gradient, the visual ones that of a whole run."""
    frozen = {"training": {"phase": "s1.1"}}
    expected = run(gpu_config(**frozen), [row(MIXED)], tmp_path)
    found = run(gpu_config(**merge_sections(sections, frozen)), [row(MIXED)], tmp_path)
    assert not any(".text." in name for name in found.gradients)
    assert any(".visual." in name for name in found.gradients)
    assert_near(found.gradients, expected.gradients, BF16_KERNELS)


@pytest.mark.parametrize(("writer", "reader"), [({}, ENGINE), (ENGINE, {})], ids=["torch-engine", "engine-torch"])
def test_checkpoint_of_the_other(tmp_path: Path, writer: dict, reader: dict) -> None:
    rows = [row(MIXED, seed) for seed in range(3)]
    written = run(gpu_config(**writer), rows[:2], tmp_path, save=tmp_path / "checkpoint")
    read = run(gpu_config(**reader), [], tmp_path, restore=tmp_path / "checkpoint")
    assert read.step == written.step == 2
    assert read.weights.keys() == written.weights.keys()
    assert all(torch.equal(read.weights[name], written.weights[name]) for name in written.weights)
    here = run(gpu_config(**reader), rows[2:], tmp_path, restore=tmp_path / "checkpoint")
    there = run(gpu_config(**writer), rows[2:], tmp_path, restore=tmp_path / "checkpoint")
    assert here.losses == pytest.approx(there.losses, rel=BF16_KERNELS)
    assert_near(here.weights, there.weights, BF16_KERNELS_WEIGHTS)


def test_fused_adam_is_our_adamw() -> None:
    """The same updates, moments and step counts, with an empty group and a parameter that has no gradient."""
    from navil_megatron.kernels.te_kernels import Adam

    generator = torch.Generator("cuda").manual_seed(0)
    start = [torch.randn(size, device="cuda", generator=generator) for size in ((7, 5), (300,), (3,))]
    sides = []
    for kind in (AdamW, Adam):
        weights = [torch.nn.Parameter(weight.clone()) for weight in start]
        groups = [{"params": weights}, {"params": []}]
        sides.append((weights, kind(groups, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)))
    assert [group["step"] for group in sides[1][1].param_groups] == [0, 0]
    for _ in range(5):
        gradients = [torch.randn(weight.shape, device="cuda", generator=generator) for weight in start[:2]]
        for weights, optimizer in sides:
            for weight, gradient in zip(weights, gradients, strict=False):
                weight.grad = gradient.clone()
            optimizer.step()
    (ours, our_adam), (theirs, their_adam) = sides
    assert [group["step"] for group in their_adam.param_groups] == [group["step"] for group in our_adam.param_groups]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(other, mine, **FUSED_ADAM)
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(their_adam.state[other][name], our_adam.state[mine][name], **FUSED_ADAM)
