"""When a step counts as bad, and when bad steps are too many."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from navil_megatron.kernels.amax_history import forget_bad_amax
from navil_megatron.training.number_watch import NumberWatch
from navil_megatron.training.replica_check import odd_ranks
from navil_megatron.training.state import TrainingState
from tests.ranks import tiny_config


def watch_of(state: TrainingState, **training: Any) -> NumberWatch:
    """One that only judges: it needs no ranks."""
    groups = SimpleNamespace(dp_cp=None, expt_dp=None, pp=SimpleNamespace(rank=lambda: 0))
    return NumberWatch(tiny_config(training=training), SimpleNamespace(groups=groups), [], state)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "norm", "why"),
    [
        (1.0, 2.0, ""),
        (math.nan, 2.0, "loss not finite"),
        (-math.inf, 2.0, "loss not finite"),
        (1.0, math.inf, "gradient norm not finite"),
        (math.nan, math.nan, "loss and gradient norm not finite"),
    ],
)
def test_what_is_not_finite_is_refused(loss: float, norm: float, why: str) -> None:
    assert watch_of(TrainingState()).judge(loss, norm) == why


def test_a_spike_is_measured_by_the_median_of_enough_updates() -> None:
    norms = [1.0] * 10 + [2.0] * 9
    state = TrainingState(recent_norms=norms)
    watch = watch_of(state, grad_norm_limit=3.0)
    assert watch.judge(1.0, 1e9) == ""  # 19 are too few to say what is usual
    state.recent_norms = [*norms, 2.0]
    assert watch.judge(1.0, 4.5) == ""
    assert watch.judge(1.0, 4.6) == "gradient norm 4.6 is more than 3 times the usual 1.5"
    assert watch_of(state).judge(1.0, 1e9) == ""


@pytest.mark.parametrize(
    ("refused", "training", "told"),
    [
        ([7], {}, ""),
        ([7], {"on_bad_step": "stop"}, 'training.on_bad_step = "stop"'),
        ([3, 5, 6, 7], {"max_bad_steps_in_a_row": 3}, ""),
        ([3, 5, 6, 7], {"max_bad_steps_in_a_row": 2}, "3 bad steps in a row, training.max_bad_steps_in_a_row = 2"),
        ([3, 5, 7], {"max_bad_steps_per_1000": 3}, ""),
        ([3, 5, 7], {"max_bad_steps_per_1000": 2}, "3 bad steps among the last 1,000, training.max_bad_steps_per_1000"),
        ([7], {"max_bad_steps_in_a_row": 0}, "1 bad steps in a row"),
    ],
)
def test_how_many_bad_steps_are_too_many(refused: list[int], training: dict[str, Any], told: str) -> None:
    said = watch_of(TrainingState(step=7, refused_steps=refused), **training)._too_many()
    assert said.startswith(told) and bool(said) == bool(told)


@pytest.mark.parametrize(
    ("sums", "odd"),
    [([7, 7, 8, 7], [6]), ([8, 7, 7], [2]), ([7, 8], [2, 4]), ([7, 7, 8, 8], [2, 4, 6, 8]), ([1, 2, 2, 2, 3], [2, 10])],
)
def test_whoever_differs_from_most_is_odd(sums: list[int], odd: list[int]) -> None:
    assert odd_ranks(sums, [2, 4, 6, 8, 10][: len(sums)]) == odd


def test_a_state_of_before_is_read() -> None:
    stored = {"step": 3, "consumed_samples": 4, "consumed_tokens": 5, "loader": {}}
    assert TrainingState.from_dict(stored) == TrainingState(step=3, consumed_samples=4, consumed_tokens=5)


def test_histories_of_delayed_scaling_forget_what_is_not_finite() -> None:
    layer = torch.nn.Linear(2, 2)
    history = torch.tensor([[1.0, math.inf], [math.nan, 2.0]])
    layer.fp8_meta = {"scaling_fwd": SimpleNamespace(amax_history=history), "recipe": None}  # type: ignore[assignment]
    forget_bad_amax(torch.nn.Sequential(layer))
    assert history.tolist() == [[1.0, 0.0], [0.0, 2.0]]
