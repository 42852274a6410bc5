"""A modality that a microbatch lacks leaves zero gradients, never none, and no rank waits."""

import pytest
import torch

from navil_megatron.models.build import build_model
from navil_megatron.training.batch import build_model_inputs
from tests.oracle import IMAGE_ONLY, TEXT_ONLY, global_batch, oracle_config
from tests.ranks import run_ranks, start_session


def gradients(rank: int, world_size: int, composition: tuple, parallel: dict) -> dict[str, float | None]:
    config = oracle_config(parallel=parallel)
    with start_session(rank, world_size, config) as session:
        (model,) = build_model(config, session.groups, session.device)
        (microbatch,) = global_batch(config, (composition,), session)
        if composition == TEXT_ONLY:
            assert not microbatch.visual_token_mask.any()
        inputs = build_model_inputs(microbatch)
        (model(inputs) * inputs.loss_weights).sum().backward()
        return {
            name: None if parameter.grad is None else float(parameter.grad.abs().sum())
            for name, parameter in model.named_parameters()
        }


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"cp": 2}])
def test_text_only(layout: dict) -> None:
    for found in run_ranks(max([1, *layout.values()]), gradients, TEXT_ONLY, layout):
        assert None not in found.values()
        visual = {n: v for n, v in found.items() if ".visual." in n or n.startswith(("vision_encoder", "connector"))}
        assert visual and not any(visual.values())
        assert found["decoder.layers.1.mlp.linear_fc1.text.weight"] > 0


def test_images_with_a_single_text_token() -> None:
    for found in run_ranks(2, gradients, IMAGE_ONLY, {"tp": 2, "sequence_parallel": True}):
        assert None not in found.values()
        assert found["decoder.layers.0.mlp.linear_fc1.visual.weight"] > 0
    assert torch.isfinite(torch.tensor(list(found.values()))).all()
