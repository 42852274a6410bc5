"""The plan of the data order: full rows, a pure function of (seed, step), the same for every number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_megatron.data.packing import DataPlan, pack_rows, rank_rows, shuffled


def row_tokens(num_text: np.ndarray, num_visual: np.ndarray, row: np.ndarray, pad: int) -> int:
    visual = int(num_visual[row].sum())
    return int(num_text[row].sum()) + -(-visual // pad) * pad


def make_plan(num_samples: int = 500, *, seed: int = 3, seq_length: int = 256, pad: int = 16) -> DataPlan:
    random = np.random.default_rng(1)
    num_text, num_visual = random.integers(1, 60, num_samples), random.integers(0, 120, num_samples)
    samples = np.arange(num_samples) * 2 + 1  # not the positions themselves, so that a mix-up shows
    return DataPlan(samples, num_text, num_visual, seq_length=seq_length, pad_segments_to=pad, seed=seed)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 48)), max_size=60),
    pad=st.sampled_from([1, 8, 16]),
)
def test_rows_hold_every_sample_once_and_never_too_much(lengths: list[tuple[int, int]], pad: int) -> None:
    table = np.array(lengths, dtype=np.int64).reshape(-1, 2)
    rows = pack_rows(table[:, 0], table[:, 1], 96, pad)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert all(row_tokens(table[:, 0], table[:, 1], np.array(row), pad) <= 96 for row in rows)


def test_rows_are_full_on_a_heavy_tail() -> None:
    random = np.random.default_rng(0)
    num_visual = np.clip(random.lognormal(6.3, 0.9, 20_000), 20, 13_000).astype(np.int64)
    num_text = np.clip(random.lognormal(4.0, 0.8, 20_000), 5, 3_000).astype(np.int64) + num_visual // 20
    plan = DataPlan(np.arange(20_000), num_text, num_visual, seq_length=16_384, pad_segments_to=128, seed=0)
    assert plan.fill >= 0.98


def test_a_step_does_not_depend_on_what_was_asked_before() -> None:
    forward = [np.concatenate(make_plan().step_rows(step, 8)).tolist() for step in range(40)]
    plan = make_plan()
    for step in shuffled(40, 5).tolist():
        assert np.concatenate(plan.step_rows(step, 8)).tolist() == forward[step]


def test_every_epoch_holds_every_sample_once_in_another_order_and_company() -> None:
    plan = make_plan()
    epochs = []
    for epoch in range(3):
        rows = [plan.row(epoch * plan.num_rows + number) for number in range(plan.num_rows)]
        assert sorted(np.concatenate(rows).tolist()) == [2 * number + 1 for number in range(500)]
        epochs.append(rows)
    assert not np.array_equal(np.concatenate(epochs[0]), np.concatenate(epochs[1]))
    company = [{frozenset(row.tolist()) for row in rows} for rows in epochs]
    assert len(company[0] & company[1]) < plan.num_rows


def test_steps_that_straddle_epochs_leave_nothing_out() -> None:
    plan = make_plan()
    assert plan.num_rows % 8
    steps = [row for step in range(plan.num_rows) for row in plan.step_rows(step, 8)]
    seen = np.concatenate(steps)
    assert np.unique(seen, return_counts=True)[1].tolist() == [8] * 500


def test_rows_of_every_epoch_fit() -> None:
    random = np.random.default_rng(1)
    num_text, num_visual = random.integers(1, 60, 500), random.integers(0, 120, 500)
    plan = DataPlan(np.arange(500), num_text, num_visual, seq_length=256, pad_segments_to=16, seed=0)
    for number in range(4 * plan.num_rows):
        assert row_tokens(num_text, num_visual, plan.row(number), 16) <= 256


def test_the_seed_decides_the_order() -> None:
    orders = [np.concatenate(make_plan(seed=seed).step_rows(0, 8)).tolist() for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]


def test_the_shuffle_is_pinned() -> None:
    assert shuffled(8, 1234, 0).tolist() == [1, 6, 2, 0, 3, 5, 7, 4]


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_ranks_share_out_the_same_global_batch(dp_size: int, micro_batch_size: int) -> None:
    rows = list(range(8))
    dealt = [rank_rows(rows, rank, dp_size, micro_batch_size) for rank in range(dp_size)]
    assert [row for microbatches in dealt for group in microbatches for row in group] == rows
    assert all(len(group) == micro_batch_size for microbatches in dealt for group in microbatches)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="8 rows do not divide into 3 ranks"):
        rank_rows(list(range(8)), 0, 3, 1)
