"""The optimizer on several ranks equals torch's AdamW in one process, and works with nothing to train."""

import pytest
import torch

from tests.distributed.tiny_training import Run, TinyModel
from tests.ranks import run_ranks, start_session, tiny_config
from tests.tolerances import RANKS

STEPS = 4


def _train(rank: int, world_size: int, sections: dict, frozen: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
    config = tiny_config(**sections)
    with start_session(rank, world_size, config) as session:
        run = Run(config, session, frozen)
        for number in range(1, STEPS + 1):
            run.step(number)
        return run.weights(), run.norms


def _torch_alone(rank: int, world_size: int, clip_grad: float | None) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Plain torch.optim.AdamW on the whole batch."""
    config = tiny_config()
    with start_session(rank, world_size, config) as session:
        model: TinyModel = Run(config, session).chunks[0].module
        plain = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in model.named_parameters()}
        decayed = [weight for weight in plain.values() if weight.ndim > 1]
        exempt = [weight for weight in plain.values() if weight.ndim == 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}],
            lr=1e-2,
            betas=(0.9, 0.95),
            weight_decay=0.05,
        )
        norms = []
        for number in range(1, STEPS + 1):
            rows = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(number))
            output = torch.func.functional_call(model, plain, rows)
            optimizer.zero_grad()
            ((output**2).sum() / 4).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(plain.values(), clip_grad or float("inf"))))
            optimizer.step()
        return {name: weight.detach() for name, weight in plain.items()}, norms


@pytest.mark.parametrize("clip_grad", [1.0, None])
@pytest.mark.parametrize("distributed", [True, False])
def test_two_replicas_equal_torch_adamw(distributed: bool, clip_grad: float | None) -> None:
    ((expected, expected_norms),) = run_ranks(1, _torch_alone, clip_grad)
    sections = {"optimizer": {"distributed": distributed, "clip_grad": clip_grad}}
    for weights, norms in run_ranks(2, _train, sections, False):
        torch.testing.assert_close(weights, expected, **RANKS)
        assert norms == pytest.approx(expected_norms, rel=1e-5)


def test_two_tensor_parallel_ranks_equal_one() -> None:
    ((expected, expected_norms),) = run_ranks(1, _train, {}, False)
    first, second = run_ranks(2, _train, {"parallel": {"tp": 2}}, False)
    axes = {"up.weight": 0, "up.bias": 0, "down.weight": 1}
    for name, weight in expected.items():
        split = name in axes
        whole = torch.cat([first[0][name], second[0][name]], axes[name]) if split else first[0][name]
        torch.testing.assert_close(whole, weight, **RANKS)
    assert first[1] == second[1] == pytest.approx(expected_norms, rel=1e-5)


@pytest.mark.parametrize("distributed", [True, False])
def test_bf16_keeps_fp32_master_weights(distributed: bool) -> None:
    """At a rate far below BF16's resolution the weights still move, because the master weights do."""
    sections = {
        "precision": {"type": "bf16"},
        "optimizer": {"distributed": distributed, "lr": 1e-4, "clip_grad": None},
    }
    results = run_ranks(2, _master_weights, sections)
    for before, after, moved in results:
        assert after.dtype == torch.float32
        assert moved > 0
        assert not torch.equal(before, after)


def _master_weights(rank: int, world_size: int, sections: dict) -> tuple[torch.Tensor, torch.Tensor, float]:
    config = tiny_config(**sections)
    with start_session(rank, world_size, config) as session:
        run = Run(config, session)
        masters = [weight for group in run.optimizer.param_groups for weight in group["params"]]
        before = torch.cat([weight.detach().flatten() for weight in masters])
        run.step(1)
        after = torch.cat([weight.detach().flatten() for weight in masters])
        return before, after, float((after - before).abs().max())


def _frozen_first_stage(rank: int, world_size: int, distributed: bool) -> tuple[bool, list[float], int]:
    """Two stages, of which the first is frozen."""
    config = tiny_config(parallel={"pp": 2}, optimizer={"distributed": distributed})
    with start_session(rank, world_size, config) as session:
        run = Run(config, session, frozen=session.is_first_stage)
        before = run.weights()
        for number in range(1, 3):
            run.step(number)
        unchanged = all(torch.equal(before[name], weight) for name, weight in run.weights().items())
        return unchanged, run.norms, max(group["step"] for group in run.optimizer.param_groups)


@pytest.mark.parametrize("distributed", [True, False])
def test_a_stage_with_nothing_to_train_steps_and_shares_the_norm(distributed: bool) -> None:
    frozen, trained = run_ranks(2, _frozen_first_stage, distributed)
    assert frozen[0] and not trained[0]
    assert frozen[1] == trained[1] and min(trained[1]) > 0
    assert frozen[2] == trained[2] == 2


@pytest.mark.parametrize("distributed", [True, False])
def test_a_model_with_nothing_to_train_steps(distributed: bool) -> None:
    for _, norms in run_ranks(2, _train, {"optimizer": {"distributed": distributed}}, True):
        assert norms == [0.0] * STEPS
