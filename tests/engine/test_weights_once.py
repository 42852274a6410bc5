"""Weights are quantized once a step, frozen ones too, and held no longer. Amax is shared inside a replica alone."""

from typing import Any

import pytest
import torch

from navil_megatron.models.build import build_model
from navil_megatron.training.batch import build_model_inputs
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import evaluate_step, train_step
from tests.engine.conftest import Place
from tests.engine.host import run_rehearsed
from tests.engine.runs import ENGINE, MIXED, MODEL, row, run_config, run_steps
from tests.oracle import merge_sections
from tests.ranks import start_session

LAYERS, PRODUCTS, MODALITIES = MODEL.language.num_layers, 4, 2


def sections(fp8: str, **training: Any) -> dict[str, Any]:
    return merge_sections(ENGINE, {"precision": {"fp8": fp8}, "training": training})


def quantized(rank: int, world_size: int, configs: dict[str, Any]) -> dict[str, int]:
    """What is quantized in a step of one microbatch and in one of three; each again, after the weights changed."""
    from tests.engine.standin import calls

    found = {}
    for name, config in configs.items():
        with start_session(rank, world_size, config) as session:
            chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
            optimizer = build_optimizer(config, chunks, session)
            for step, num_microbatches in enumerate((1, 3, 1, 3)):
                rows = [row(config, MIXED, step + number, session) for number in range(num_microbatches)]
                calls.CALLS.clear()
                train_step(config, session, chunks, optimizer, rows, lr=1e-3)
                found[f"{name} {step}"] = calls.count()["quantize"]
    return found


def test_each_weight_is_quantized_once_a_step() -> None:
    configs = {
        f"{fp8} {phase} {recompute}": run_config("cpu", **sections(fp8, phase=phase, recompute=recompute))
        for fp8, phase, recompute in (
            ("tensorwise", "s2", "none"),
            ("tensorwise", "s1.1", "full"),
            ("blockwise", "s2", "full"),
            ("delayed", "s2", "none"),
        )
    }
    (found,) = run_rehearsed(1, quantized, configs)
    for name in configs:
        one, three, again, three_again = (found[f"{name} {step}"] for step in range(4))
        assert (again, three_again) == (one, three)
        # Both hold the weights once, and the second three times the activations of the first.
        assert (3 * one - three) // 2 == LAYERS * PRODUCTS * MODALITIES, name


def between_steps(rank: int, world_size: int, config: Any) -> dict[str, list[float]]:
    """Losses of a row by a schedule, which holds weights, and by the model alone, which holds none, after each update
    and after other weights were put in place.
    """
    found: dict[str, list[float]] = {"schedule": [], "alone": []}
    with start_session(rank, world_size, config) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        optimizer = build_optimizer(config, chunks, session)
        model = chunks[0].module
        start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        held_out = row(config, MIXED, 7, session)

        def look() -> None:
            loss = evaluate_step(config, session, chunks, [held_out])
            found["schedule"].append(float(loss.loss_sum))
            inputs = session.platform.upload(build_model_inputs(held_out))()
            with torch.no_grad():
                found["alone"].append(float((model(inputs) * inputs.loss_weights).sum()))

        for step in range(2):
            look()
            train_step(config, session, chunks, optimizer, [row(config, MIXED, step, session)] * 2, lr=1e-3)
        look()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name])
        look()
    return found


@pytest.mark.parametrize("fp8", ["tensorwise", "blockwise"])
def test_no_stale_weight(place: Place, fp8: str) -> None:
    (found,) = place.run(1, between_steps, run_config(place.device, **sections(fp8)))
    assert found["schedule"] == found["alone"]
    assert found["schedule"][0] == found["schedule"][3]
    assert len(set(found["schedule"])) == 3


def test_weights_that_are_gathered_late(place: Place) -> None:
    """The distributed optimizer brings each layer's weights when its first forward pass begins."""
    overlap = {"distributed": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    config = run_config(place.device, **merge_sections(sections("tensorwise"), {"optimizer": overlap}))
    for found in place.run(2, between_steps, config):
        assert found["schedule"] == found["alone"]
        assert len(set(found["schedule"][:3])) == 3


def reductions(rank: int, world_size: int, config: Any) -> list[int]:
    """Sizes of the groups over which amax is reduced in a step of two microbatches."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    sizes: list[int] = []
    original = FP8GlobalStateManager.reduce_tensor_across_group_op_max

    def reduce(tensor: torch.Tensor, group: Any) -> None:
        sizes.append(group.size())
        original(tensor, group)

    FP8GlobalStateManager.reduce_tensor_across_group_op_max = reduce
    run_steps(
        rank, world_size, config, [[MIXED] * 4 if config.parallel.tensor_model_parallel_size == 1 else [MIXED] * 2]
    )
    return sizes


@pytest.mark.parametrize(("parallel", "expected"), [({}, []), ({"tensor_model_parallel_size": 2}, [2] * 4)])
def test_amax_of_a_replica(parallel: dict[str, Any], expected: list[int]) -> None:
    """Forward and backward of each microbatch, over the ranks that hold parts of a layer; replicas do not wait."""
    config = run_config("cpu", **merge_sections(sections("delayed"), {"parallel": parallel}))
    assert run_rehearsed(2, reductions, config) == [expected] * 2
