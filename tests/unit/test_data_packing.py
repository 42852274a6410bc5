"""Packing and dealing: full rows, every sample once, equal work for every rank."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_megatron.data.packing import deal_rows, imbalance, pack_rows


def row_tokens(num_text: np.ndarray, num_visual: np.ndarray, row: np.ndarray, pad: int) -> int:
    visual = int(num_visual[row].sum())
    return int(num_text[row].sum()) + -(-visual // pad) * pad


def fill_of(rows: list[np.ndarray], tokens: np.ndarray, seq_length: int) -> float:
    return float(tokens.sum() / (len(rows) * seq_length))


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 48)), max_size=80),
    pad=st.sampled_from([1, 8, 16]),
)
def test_rows_hold_every_sample_once_and_never_too_much(lengths: list[tuple[int, int]], pad: int) -> None:
    table = np.array(lengths, dtype=np.int64).reshape(-1, 2)
    rows = pack_rows(table[:, 0], table[:, 1], table.sum(axis=1) ** 2, 96, pad)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert all(len(row) and row_tokens(table[:, 0], table[:, 1], row, pad) <= 96 for row in rows)


@pytest.mark.parametrize("pad", [1, 16, 128])
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_full_and_alike_on_a_heavy_tail(pad: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    num_visual = np.clip(random.lognormal(6.3, 0.9, 20_000), 20, 12_000).astype(np.int64)
    num_text = np.clip(random.lognormal(4.0, 0.8, 20_000), 5, 3_000).astype(np.int64) + num_visual // 20
    cost = num_text + 3 * num_visual
    rows = pack_rows(num_text, num_visual, cost, 16_384, pad)
    assert fill_of(rows, num_text + num_visual, 16_384) >= 0.98
    costs = np.array([cost[row].sum() for row in rows])
    assert costs.max() <= 1.1 * costs.mean()


@pytest.mark.parametrize(("low", "high", "least"), [(150, 450, 0.96), (100, 300, 0.96), (30, 200, 0.98)])
def test_rows_of_few_samples_are_filled_by_best_fit(low: int, high: int, least: float) -> None:
    length = np.random.default_rng(0).integers(low, high, 4000)
    rows = pack_rows(length // 4, length - length // 4, length, 768, 16)
    assert fill_of(rows, length, 768) >= least


@pytest.mark.parametrize(("low", "high", "seq_length"), [(18, 26, 1024), (18, 26, 512), (40, 130, 512)])
def test_rows_of_many_samples_are_mixed(low: int, high: int, seq_length: int) -> None:
    length = np.random.default_rng(0).integers(low, high, 6000)
    rows = pack_rows(length - length // 3, length // 3, length, seq_length, 16)
    assert fill_of(rows, length, seq_length) >= 0.95
    assert np.mean([length[row].std() for row in rows]) >= 0.7 * length.std()


def test_samples_over_half_a_row_get_one_each() -> None:
    length = np.full(500, 9000)
    assert len(pack_rows(length, 0 * length, length, 16_384, 16)) == 500


def test_a_sample_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="sample 1 needs 98 tokens, a row holds 96"):
        pack_rows(np.array([5, 50]), np.array([5, 41]), np.array([1, 1]), 96, 16)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.randoms(use_true_random=False))
def test_every_rank_gets_equally_many_rows_and_every_row_goes_to_one(ranks: int, per_rank: int, random) -> None:  # type: ignore[no-untyped-def]
    costs = np.array([random.randint(1, 10**15) for _ in range(ranks * per_rank)])
    dealt = deal_rows(costs, ranks)
    assert [len(rows) for rows in dealt] == [per_rank] * ranks
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(costs)))
    assert 1.0 <= imbalance(costs, dealt) <= ranks


@pytest.mark.parametrize("ranks", [8, 16, 32, 64])
def test_work_is_even_over_ranks(ranks: int) -> None:
    costs = (np.random.default_rng(ranks).lognormal(0, 0.2, 448) * 1e12).astype(np.int64)
    assert imbalance(costs, deal_rows(costs, ranks)) <= 1.05


def test_rows_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ValueError, match="7 rows do not divide into 2 ranks"):
        deal_rows(np.arange(7), 2)
