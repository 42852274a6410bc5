"""Transformer Engine's kernels against torch's in BF16 on one rank: outputs, gradients, an update, checkpoints."""

import functools
from pathlib import Path

import pytest
import torch

from navil_megatron.config.run import NaViLConfig
from navil_megatron.kernels.adamw import AdamW
from tests.engine.conftest import Place
from tests.engine.runs import (
    ENGINE,
    FAR,
    FUSED_SUMS,
    IMAGE_ONLY,
    MIXED,
    SMOOTH,
    TEXT_ONLY,
    Outcome,
    assert_near,
    forward,
    moved,
    run_config,
    run_steps,
    whole,
)
from tests.oracle import Composition, merge_sections
from tests.tolerances import BF16_KERNELS, BF16_ROUTED, FUSED_ADAM

EXPERTS = {"language": {"num_experts": 4, "experts_per_token": 2, "ffn_hidden_size": 256}}
RECOMPUTE: dict[str, dict] = {
    "attention": {"recompute": "selective"},
    "mlp": {"recompute": "selective", "recompute_modules": ("mlp",)},
    "encoder": {"recompute": "selective", "recompute_modules": ("encoder",)},
    "full": {"recompute": "full"},
}
ROWS = pytest.mark.parametrize("composition", [MIXED, TEXT_ONLY, IMAGE_ONLY], ids=["mixed", "text", "images"])
ENGINES = pytest.mark.parametrize("sections", [ENGINE, FUSED_SUMS], ids=["engine", "fused-sums"])


def one_step(place: Place, composition: Composition = MIXED, **sections: dict) -> Outcome:
    return _one_step(place, run_config(place.device, **sections), composition)


@functools.cache
def _one_step(place: Place, config: NaViLConfig, composition: Composition) -> Outcome:
    (outcome,) = place.run(1, run_steps, config, [[composition]])
    return outcome


@functools.cache
def start(place: Place) -> Outcome:
    """The weights before the first step."""
    (outcome,) = place.run(1, run_steps, run_config(place.device), [])
    return outcome


@ROWS
def test_outputs(place: Place, composition: Composition) -> None:
    (expected,) = place.run(1, forward, run_config(place.device), composition)
    (found,) = place.run(1, forward, run_config(place.device, **ENGINE), composition)
    assert_near(found, expected, BF16_KERNELS)


@ENGINES
@ROWS
def test_one_step(place: Place, sections: dict, composition: Composition) -> None:
    expected = one_step(place, composition, optimizer=FAR)
    found = one_step(place, composition, optimizer=FAR, **sections)
    assert found.losses == pytest.approx(expected.losses, rel=BF16_KERNELS)
    gradients = whole([found], "gradients")
    assert_near(gradients, whole([expected], "gradients"), BF16_KERNELS)
    assert_near(moved([start(place)], [found]), moved([start(place)], [expected]), BF16_KERNELS)
    if composition == TEXT_ONLY:
        visual = [name for name in gradients if ".visual." in name or name.startswith("vision_encoder.")]
        assert visual and not any(gradients[name].any() for name in visual)


@ENGINES
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recompute_changes_nothing(place: Place, sections: dict, recompute: str) -> None:
    expected = one_step(place, **sections)
    found = one_step(place, **merge_sections(sections, {"training": RECOMPUTE[recompute]}))
    assert found.losses == expected.losses
    assert_near(whole([found], "gradients"), whole([expected], "gradients"), 0)


@ENGINES
@pytest.mark.parametrize("phase", ["s1.1", "s1.2"])
def test_frozen_parts(place: Place, sections: dict, phase: str) -> None:
    """What is frozen has no gradient and stays, the rest has that of torch's kernels."""
    expected = one_step(place, training={"phase": phase})
    found = one_step(place, **merge_sections(sections, {"training": {"phase": phase}}))
    gradients = whole([found], "gradients")
    assert_near(gradients, whole([expected], "gradients"), BF16_KERNELS)
    still = {name: change for name, change in moved([start(place)], [found]).items() if name not in gradients}
    assert any(".text." in name for name in still)
    assert not any(change.any() for change in still.values())


def test_several_experts(place: Place) -> None:
    expected = one_step(place, model=EXPERTS)
    found = one_step(place, model=EXPERTS, **ENGINE)
    assert found.losses == pytest.approx(expected.losses, rel=BF16_KERNELS)
    assert_near(whole([found], "gradients"), whole([expected], "gradients"), BF16_ROUTED)


@pytest.mark.parametrize(("writer", "reader"), [({}, ENGINE), (ENGINE, {})], ids=["torch-engine", "engine-torch"])
def test_checkpoint_of_the_other(place: Place, tmp_path: Path, writer: dict, reader: dict) -> None:
    folder = tmp_path / "checkpoint"
    writing, reading = (run_config(place.device, **sections, optimizer=SMOOTH) for sections in (writer, reader))
    (written,) = place.run(1, run_steps, writing, [[MIXED]] * 2, None, folder)
    (read,) = place.run(1, run_steps, reading, [], folder)
    assert read.step == written.step == 2
    saved, restored = whole([written], "weights"), whole([read], "weights")
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[name], saved[name]) for name in saved)
    (there,) = place.run(1, run_steps, writing, [[MIXED]], folder)
    (here,) = place.run(1, run_steps, reading, [[MIXED]], folder)
    assert here.losses == pytest.approx(there.losses, rel=BF16_KERNELS)
    # The moments that were restored say most of this step.
    assert_near(moved([read], [here]), moved([read], [there]), BF16_KERNELS)


def updates_of_both(rank: int, world_size: int, device: str) -> list[tuple]:
    """Steps, weights and moments by our AdamW and the engine's; one group is empty, one parameter has no gradient."""
    from navil_megatron.kernels.te_kernels import Adam

    generator = torch.Generator(device).manual_seed(0)
    first = [torch.randn(size, device=device, generator=generator) for size in ((7, 5), (300,), (3,))]
    given = [[torch.randn(x.shape, device=device, generator=generator) for x in first[:2]] for _ in range(5)]
    found = []
    for kind in (AdamW, Adam):
        weights = [torch.nn.Parameter(weight.clone()) for weight in first]
        groups = [{"params": weights}, {"params": []}]
        optimizer = kind(groups, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
        steps = [[group["step"] for group in optimizer.param_groups]]
        for gradients in given:
            for weight, gradient in zip(weights, gradients, strict=False):
                weight.grad = gradient.clone()
            optimizer.step()
        steps.append([group["step"] for group in optimizer.param_groups])
        moments = [optimizer.state[weight][name] for weight in weights[:2] for name in ("exp_avg", "exp_avg_sq")]
        found.append((steps, [tensor.detach().cpu() for tensor in (*weights, *moments)]))
    return found


def test_fused_adam_is_our_adamw(place: Place) -> None:
    (((steps, ours), (their_steps, theirs)),) = place.run(1, updates_of_both, place.device)
    assert their_steps == steps
    assert steps[0] == [0, 0]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(other, mine, **FUSED_ADAM)
