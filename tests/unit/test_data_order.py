"""The order of samples: every epoch every sample once, from few shards at a time; shares of sources exact."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_megatron.data import order
from navil_megatron.data.order import Mixture, SourceOrder


def starts_of(sizes: list[int]) -> np.ndarray:
    return np.cumsum([0, *sizes])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any), st.integers(0, 5), st.data())
def test_any_stretch_of_the_stream_is_the_same_however_it_is_read(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    whole = SourceOrder(starts_of(sizes), seed).take(0, 3 * sum(sizes))
    for epoch in np.split(whole, 3):
        assert sorted(epoch.tolist()) == list(range(sum(sizes)))
    first = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(first, len(whole)))
    assert SourceOrder(starts_of(sizes), seed).take(first, end).tolist() == whole[first:end].tolist()


def test_epochs_and_seeds_differ() -> None:
    stream = SourceOrder(starts_of([50, 50]), 1)
    first, second = stream.take(0, 100), stream.take(100, 200)
    assert first.tolist() != second.tolist() != SourceOrder(starts_of([50, 50]), 2).take(0, 100).tolist()


def test_a_stretch_touches_few_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "GROUP_SAMPLES", 500)
    stream = SourceOrder(starts_of([100] * 200), 3)
    for first in range(0, 20_000, 250):
        assert len(set((stream.take(first, first + 250) // 100).tolist())) <= 10  # two groups of five shards
    near = stream.take(0, 20_000)
    assert len(set((near[:500] // 100).tolist())) == 5
    assert np.abs(np.diff(near[:500])).mean() > 100  # and inside a group the samples are shuffled


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 2000), st.floats(1e-6, 1e6)), min_size=1, max_size=5),
    st.integers(1, 400),
)
def test_shares_are_exact_in_the_long_run(sources: list[tuple[int, float]], windows: int) -> None:
    mixture = Mixture([SourceOrder(starts_of([size]), 0) for size, _ in sources], [weight for _, weight in sources])
    counts = np.zeros(len(sources), dtype=np.int64)
    numbers = range(windows - 1, windows)  # counts up to here follow from the boundary, so the last is enough
    for number in numbers:
        drawn = mixture.window(number).sources
        counts += np.bincount(drawn, minlength=len(sources))
    for (_, weight), share, count in zip(sources, mixture.shares, counts.tolist(), strict=True):
        assert share == Fraction(weight) / sum(Fraction(other) for _, other in sources)
        assert abs(count - mixture.window_samples * share) <= 1


def test_windows_continue_one_another() -> None:
    def mixture() -> Mixture:
        return Mixture([SourceOrder(starts_of([70]), 0, 0), SourceOrder(starts_of([30]), 0, 1)], [3, 1])

    joined: list[list[int]] = [[], []]
    for number in range(40):
        drawn, samples, _ = mixture().window(number)
        for source in range(2):
            joined[source] += samples[drawn == source].tolist()
    for source, (size, share) in enumerate([(70, 0.75), (30, 0.25)]):
        assert joined[source] == SourceOrder(starts_of([size]), 0, source).take(0, len(joined[source])).tolist()
        assert len(joined[source]) == pytest.approx(40 * mixture().window_samples * share, abs=1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 1500), st.floats(1e-3, 1e3)), min_size=1, max_size=4),
    st.integers(0, 20),
)
def test_stretches_are_cut_where_a_source_begins_an_epoch(sources: list[tuple[int, float]], number: int) -> None:
    orders = [SourceOrder(starts_of([size]), 0, place) for place, (size, _) in enumerate(sources)]
    mixture = Mixture(orders, [weight for _, weight in sources])
    drawn, _, stretches = mixture.window(number)
    for source, (size, _) in enumerate(sources):
        mine = drawn == source
        first = int(number * mixture.window_samples * mixture.shares[source])
        epochs = np.arange(first, first + mine.sum()) // size
        assert (np.diff(stretches[mine]) >= 0).all()
        if size > 1:
            of_epoch = {int(epoch): {*stretches[mine][epochs == epoch].tolist()} for epoch in np.unique(epochs)}
            assert sum(map(len, of_epoch.values())) == len(set().union(*of_epoch.values())), "two epochs in one stretch"


def test_a_window_within_an_epoch_is_one_stretch() -> None:
    mixture = Mixture([SourceOrder(starts_of([10**6]), 0), SourceOrder(starts_of([1]), 1)], [1, 1])
    assert not mixture.window(1).stretches.any()


def test_a_small_source_is_taken_in_whole_epochs() -> None:
    assert Mixture([SourceOrder(starts_of([100]), 0)], [1]).window_samples == 1100
    assert Mixture([SourceOrder(starts_of([5000]), 0)], [1]).window_samples == 5000
    assert Mixture([SourceOrder(starts_of([10**9]), 0)], [1]).window_samples == order.WINDOW_SAMPLES
