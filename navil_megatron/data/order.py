"""Which sample comes n-th: the endless stream of one source, and the mixture of several. Pure functions, no I/O.

An epoch shuffles the shards, then the samples of a group of neighbouring shards together, so that every stretch of the
stream comes from a few shards at a time. Windows cut the streams of all sources by their shares, and say where in them
a source begins an epoch: what lies before is used up before what lies behind, so that every sample comes once in each.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import numpy as np

GROUP_SAMPLES = 2**17
"""Samples of neighbouring shards that are shuffled together; a larger shard is a group by itself."""
WINDOW_SAMPLES = 2**16  # most samples that are planned at once
SMALLEST_WINDOW = 2**10  # fewest samples that are planned at once: a smaller set is taken several times over
_GROUPS_KEPT = 4
ORDER_VERSION = 2
"""Counts up when the same settings give another order of samples: then no run may resume across it."""


def shuffled(count: int, *seed: int) -> np.ndarray:
    """[count] int64: a permutation that depends on the seed integers alone, also across NumPy versions.

    NumPy promises stable raw bits for a bit generator, but not for ``Generator.permutation``.
    """
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable")


class SourceOrder:
    """The endless stream of one source: epoch after epoch, every sample once in each."""

    def __init__(self, starts: np.ndarray, *seed: int) -> None:
        """Draws nothing yet; ``starts`` [num_shards + 1]: first sample of each shard, as ``SourceIndex.starts``."""
        self._starts, self._seed = starts, seed
        self._counts = np.diff(starts)
        self.num_samples = int(starts[-1])
        self._epoch, self._group = lru_cache(2)(self._make_epoch), lru_cache(_GROUPS_KEPT)(self._make_group)

    def take(self, first: int, end: int) -> np.ndarray:
        """[end - first] int64: the samples at these places of the stream."""
        taken = [np.zeros(0, dtype=np.int64)]
        while first < end:
            epoch, place = divmod(first, self.num_samples)
            _, _, group_ends = self._epoch(epoch)
            group = int(np.searchsorted(group_ends, place, side="right"))
            inside = place - (int(group_ends[group - 1]) if group else 0)
            taken.append(self._group(epoch, group)[inside : inside + end - first])
            first += len(taken[-1])
        return np.concatenate(taken)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shards in this epoch's order, [groups + 1] first shard of each group, [groups] samples up to its end)."""
        order = shuffled(len(self._counts), *self._seed, epoch)
        order = order[self._counts[order] > 0]
        ends = np.cumsum(self._counts[order])
        firsts = [0]
        while firsts[-1] < len(order):
            before = int(ends[firsts[-1] - 1]) if firsts[-1] else 0
            firsts.append(min(int(np.searchsorted(ends, before + GROUP_SAMPLES)) + 1, len(order)))
        shards = np.array(firsts, dtype=np.int64)
        return order, shards, ends[shards[1:] - 1]

    def _make_group(self, epoch: int, group: int) -> np.ndarray:
        """[n] int64: the samples of one group in order."""
        order, firsts, _ = self._epoch(epoch)
        shards = order[firsts[group] : firsts[group + 1]]
        samples = np.concatenate([np.arange(self._starts[shard], self._starts[shard + 1]) for shard in shards])
        return samples[shuffled(len(samples), *self._seed, epoch, group)]


class Window(NamedTuple):
    """Some of the mixture's samples, [n] int64 each, source by source."""

    sources: np.ndarray
    samples: np.ndarray
    stretches: np.ndarray
    """Counts from 0 whenever a source begins an epoch."""


class Mixture:
    """Sources mixed by share, in any unit. Window w holds each one's next samples; its share is exact to within one."""

    def __init__(self, orders: Sequence[SourceOrder], weights: Sequence[float]) -> None:
        self._orders = tuple(orders)
        total = sum(map(Fraction, weights))
        self.shares = tuple(Fraction(weight) / total for weight in weights)
        num_samples = sum(order.num_samples for order in orders)
        self.window_samples = min(-(-SMALLEST_WINDOW // num_samples) * num_samples, WINDOW_SAMPLES)
        """Samples of a window, to within one for each source."""

    def window(self, number: int) -> Window:
        """The samples of one window."""
        begins = self._begins(number)
        taken, stretches = [], []
        for order, share in zip(self._orders, self.shares, strict=True):
            first, end = (int(which * self.window_samples * share) for which in (number, number + 1))
            taken.append(order.take(first, end))
            cuts = [ceil(begin * share) for begin in begins]
            stretches.append(np.searchsorted(cuts, np.arange(first, end), side="right"))
        sources = np.repeat(np.arange(len(taken)), [len(samples) for samples in taken])
        return Window(sources, np.concatenate(taken), np.concatenate(stretches))

    def _begins(self, number: int) -> list[Fraction]:
        """The places of the mixture inside one window at which a source begins an epoch; one sample is in any order."""
        start, end = number * self.window_samples, (number + 1) * self.window_samples
        begins: set[Fraction] = set()
        for order, share in zip(self._orders, self.shares, strict=True):
            length = order.num_samples / share  # of an epoch
            if order.num_samples > 1:
                epochs = range(int(start / length) + 1, ceil(end / length))
                begins.update(epoch * length for epoch in epochs)
        return sorted(begins)
