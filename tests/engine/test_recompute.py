"""Recompute changes nothing, in any recipe: losses, gradients, and the scales that delayed scaling learns."""

import functools
from typing import Any

import pytest
import torch

from navil_megatron.models.build import build_model
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step
from tests.engine.conftest import Place
from tests.engine.runs import ENGINE, MIXED, TEXT_ONLY, row, run_config
from tests.oracle import merge_sections
from tests.ranks import start_session

RECIPES = ["none", "delayed", "tensorwise", "blockwise"]
CHOICES: dict[str, dict[str, Any]] = {
    "selective": {"recompute": "selective", "recompute_modules": ("attention", "mlp", "encoder")},
    "full": {"recompute": "full"},
}


def steps(rank: int, world_size: int, config: Any) -> dict[str, Any]:
    """Two steps of two microbatches."""
    found: dict[str, Any] = {"losses": [], "gradients": [], "scales": {}}
    with start_session(rank, world_size, config) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        optimizer = build_optimizer(config, chunks, session)
        for step in range(2):
            rows = [row(config, composition, 2 * step + n, session) for n, composition in enumerate((MIXED, TEXT_ONLY))]
            result = train_step(config, session, chunks, optimizer, rows, lr=1e-3)
            found["losses"].append(float(result.loss_sum))
            found["gradients"].append(
                {
                    name: parameter.main_grad.clone().cpu()
                    for chunk in chunks
                    for name, parameter in chunk.module.named_parameters()
                }
            )
        for chunk in chunks:
            for name, module in chunk.module.named_modules():
                for side in ("scaling_fwd", "scaling_bwd"):
                    state = getattr(module, "fp8_meta", {}).get(side)
                    if hasattr(state, "amax_history"):
                        found["scales"][f"{name} {side}"] = state.scale.clone().cpu(), state.amax_history.clone().cpu()
    return found


def sections(fp8: str, training: dict[str, Any]) -> dict[str, Any]:
    encoder = fp8 in ("tensorwise", "blockwise")
    return merge_sections(ENGINE, {"precision": {"fp8": fp8, "fp8_encoder": encoder}, "training": training})


@functools.cache
def kept(place: Place, fp8: str) -> dict[str, Any]:
    (found,) = place.run(1, steps, run_config(place.device, **sections(fp8, {"recompute": "none"})))
    return found


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("fp8", RECIPES)
def test_recompute_changes_nothing(place: Place, fp8: str, choice: str) -> None:
    expected = kept(place, fp8)
    (found,) = place.run(1, steps, run_config(place.device, **sections(fp8, CHOICES[choice])))
    assert found["losses"] == expected["losses"]
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert found["scales"].keys() == expected["scales"].keys()
    assert bool(found["scales"]) == (fp8 == "delayed")
    for name, states in expected["scales"].items():
        assert all(torch.equal(*pair) for pair in zip(found["scales"][name], states, strict=True)), name
