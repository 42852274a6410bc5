"""Nothing to compute: rows without an image, and each piece of the engine without a single row."""

import functools

import pytest
import torch

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


def pieces(rank: int, world_size: int, device: str) -> dict[str, tuple]:
    """Shape of the output, and what gradients there are, of each piece in each recipe."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    from navil_megatron.kernels import te_kernels

    found = {}
    size = {"dtype": torch.bfloat16}
    recipes = (None, recipe.DelayedScaling(), recipe.Float8CurrentScaling(), recipe.Float8BlockScaling())
    for name, chosen in zip(RECIPES, recipes, strict=True):
        for fused in (False, True):
            with torch.device(device):
                linear = te_kernels.build_linear(64, 32, **size)
                pair = [te_kernels.build_linear(64, 32, **size) for _ in range(2)]
                modules = {
                    "rmsnorm": te_kernels.build_norm(te_kernels.RMSNorm, 64, 1e-6, **size),
                    "layernorm": te_kernels.build_norm(te_kernels.LayerNorm, 64, 1e-6, **size),
                    "linear": linear,
                    "product": te_kernels.ModalityProduct(*pair, fuse_wgrad_accumulation=fused),
                }
                rows = torch.zeros(0, 64, **size, requires_grad=True)
                heads = torch.zeros(0, 2, 16, **size, requires_grad=True)
                bounds = torch.zeros(1, dtype=torch.int32)
            for parameter in (p for linear in pair for p in linear.parameters()):
                parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            with te.autocast(enabled=chosen is not None, recipe=chosen):
                outputs = {part: module(rows) for part, module in modules.items() if part != "product"}
                outputs["product"] = modules["product"](rows, 0, None, False)
                outputs["attention"] = te_kernels.segment_attention(
                    heads, heads, heads, groups=(), cu_seqlens=bounds, max_seqlen=0, causal=True
                )
            for part, output in outputs.items():
                leaves = [rows, *modules[part].parameters()] if part in modules else [heads]
                if part == "product":
                    leaves += [parameter for linear in pair for parameter in linear.parameters()]
                for leaf in leaves:
                    leaf.grad = None
                output.sum().backward()
                found[f"{name} {part} {fused}"] = (
                    tuple(output.shape),
                    all(leaf.grad is not None for leaf in leaves),
                    not fused and any(leaf.grad.any() for leaf in leaves),
                )
                if part == "product" and fused:
                    assert not any(p.main_grad.any() for linear in pair for p in linear.parameters())
    return found


def test_pieces_without_rows(place: Place) -> None:
    (found,) = place.run(1, pieces, place.device)
    widths = {"rmsnorm": 64, "layernorm": 64, "linear": 32, "product": 32, "attention": 32}
    assert found == {
        f"{recipe} {part} {fused}": ((0, width), True, False)
        for recipe in RECIPES
        for part, width in widths.items()
        for fused in (False, True)
    }
