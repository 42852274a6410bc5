"""The learning rate is a pure function of the step, from the first update to the last."""

import math

import pytest

from navil_megatron.config.optimizer import OptimizerConfig
from navil_megatron.training.lr_schedule import learning_rate


def test_warm_up_is_linear_from_zero_and_ends_at_the_peak() -> None:
    config = OptimizerConfig(lr=4e-4, warmup_steps=4)
    assert [learning_rate(step, config, 10) for step in (1, 2, 4, 5, 10)] == pytest.approx(
        [1e-4, 2e-4, 4e-4, 4e-4, 4e-4]
    )


def test_cosine_falls_from_the_peak_to_the_floor_and_stays() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=10, lr_schedule="cosine")
    rates = [learning_rate(step, config, 110) for step in (10, 35, 60, 110, 500)]
    expected = [1.0, 0.55 + 0.45 * math.cos(math.pi / 4), 0.55, 0.1, 0.1]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_without_warm_up_the_first_update_runs_at_full_rate(schedule: str) -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=0, lr_schedule=schedule)  # type: ignore[arg-type]
    assert learning_rate(1, config, 1_000_000) == pytest.approx(1.0)


def test_a_warm_up_longer_than_the_run_never_divides_by_zero() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=100, lr_schedule="cosine")
    assert learning_rate(5, config, 5) == pytest.approx(0.05)
