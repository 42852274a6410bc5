"""The plan of every step: which samples share a row, and which rows make the global batch. A pure function, no I/O but
the index.

The mixture is cut into windows of equally many samples; each is packed into rows, and its rows are shuffled, but where
a source begins an epoch: the rows before come before those behind, and one row between them may hold of both. Step s
reads its rows from s * batch on in the endless concatenation of windows, whoever asks. The data-parallel size appears
nowhere but in dealing.
"""

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock

import numpy as np

from navil_megatron.config.errors import UserError
from navil_megatron.data.measure import REFUSED, Measures, Ruler
from navil_megatron.data.order import Mixture, SourceOrder, Window, shuffled
from navil_megatron.data.packing import deal_rows, imbalance
from navil_megatron.data.packing_in_order import pack_in_order
from navil_megatron.data.shards.shard_index import SourceIndex
from navil_megatron.data.types import SampleId

_ORDER, _ROWS = range(2)  # purposes that get random numbers of their own
_WINDOWS_KEPT = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the plan; its arrays are [n], one entry a sample."""

    sources: np.ndarray
    indices: np.ndarray
    dropped: np.ndarray  # largest scales that each sample's images do without
    cost: int  # forward FLOPs
    num_refused: int = 0  # samples that fit no row, of the window that this row begins

    @property
    def samples(self) -> tuple[SampleId, ...]:
        """Which samples, in order."""
        return tuple(map(SampleId, self.sources.tolist(), self.indices.tolist()))


class DataPlan:
    """The order of all training data: a pure function of (seed, step)."""

    def __init__(
        self, indexes: Sequence[SourceIndex], weights: Sequence[float], ruler: Ruler, seed: int, batch_rows: int
    ) -> None:
        """Reads no record yet; ``weights`` are the sources' shares, in any unit. UserError where a source is empty."""
        for index in indexes:
            if not len(index):
                raise UserError(f"index {index.path} holds no sample: take it out of the sources or build it anew")
        self._indexes, self._ruler, self._seed, self._batch_rows = tuple(indexes), ruler, seed, batch_rows
        orders = [SourceOrder(index.starts, seed, _ORDER, number) for number, index in enumerate(indexes)]
        self.mixture = Mixture(orders, weights)
        self._window = lru_cache(_WINDOWS_KEPT)(self._make_window)
        self._first_window, self._first_rows = 0, [0]
        self._lock = Lock()

    def rank_step(self, step: int, dp_rank: int, dp_size: int) -> tuple[list[Row], float, int]:
        """(rows of one rank, in the order of the global batch; ``imbalance`` of all ranks; samples that fit no row)."""
        rows = self.step_rows(step)
        costs = np.array([row.cost for row in rows])
        ranks = deal_rows(costs, dp_size)
        return [rows[row] for row in ranks[dp_rank]], imbalance(costs, ranks), sum(row.num_refused for row in rows)

    def step_rows(self, step: int) -> list[Row]:
        """Every row of the global batch of a step."""
        places = map(self._locate, range(step * self._batch_rows, (step + 1) * self._batch_rows))
        return [self.window(window)[row] for window, row in places]

    def anchor(self, step: int) -> tuple[int, int]:
        """(window, its first row) where a step begins: with it a plan starts here without making what lies before."""
        window, place = self._locate(step * self._batch_rows)
        return window, step * self._batch_rows - place

    def restore_anchor(self, window: int, first_row: int) -> None:
        """Goes on from what ``anchor`` gave."""
        with self._lock:
            self._first_window, self._first_rows = window, [first_row]

    def window(self, number: int) -> tuple[Row, ...]:
        """The rows of one window, in the order in which steps take them; the last few windows are kept."""
        with self._lock:
            return self._window(number)

    def _locate(self, place: int) -> tuple[int, int]:
        """(window, row in it) of a row counted from the start of the run."""
        with self._lock:
            if place < self._first_rows[0]:  # before the anchor: count from the start
                self._first_window, self._first_rows = 0, [0]
            empty = 0
            while place >= self._first_rows[-1]:
                num_rows = len(self._window(self._first_window + len(self._first_rows) - 1))
                self._first_rows.append(self._first_rows[-1] + num_rows)
                empty = 0 if num_rows else empty + 1
                self._refuse_endless(empty)
            found = bisect_right(self._first_rows, place) - 1
            return self._first_window + found, place - self._first_rows[found]

    def _refuse_endless(self, empty: int) -> None:
        """Stops where a whole epoch of every source gave no row."""
        longest = max(
            len(index) / float(share) for index, share in zip(self._indexes, self.mixture.shares, strict=True)
        )
        if empty > longest / self.mixture.window_samples + 1:
            raise UserError(
                f"no sample of data.train_sources fits a row of {self._ruler.seq_length} tokens: raise data.seq_length "
                "or lower data.min_image_pixels"
            )

    def _make_window(self, number: int) -> tuple[Row, ...]:
        window = self.mixture.window(number)
        groups, refused = plan_stretches(self._ruler, self._indexes, window)
        if refused:
            index = self._indexes[refused[0].source]
            logger.warning(
                "%d of %d samples do not fit a row of %d tokens at their smallest scale and are left out; the first: "
                "sample %d of %s",
                *(len(refused), len(window.samples), self._ruler.seq_length, refused[0].number, index.path),
            )
        rows: list[Row] = []
        for stretch, (first, others) in enumerate(groups):
            seed = (self._seed, _ROWS, number, stretch) if stretch else (self._seed, _ROWS, number)
            rows += [*first, *(others[row] for row in shuffled(len(others), *seed))]
        if rows:
            rows[0] = replace(rows[0], num_refused=len(refused))
        return tuple(rows)


type Group = tuple[list[Row], list[Row]]
"""Rows that come first, as they hold the last samples of what was before; and rows in any order."""


def plan_rows(
    ruler: Ruler, indexes: Sequence[SourceIndex], sources: np.ndarray, samples: np.ndarray
) -> tuple[list[Row], list[SampleId]]:
    """Rows of [n] samples that lie source by source, in the order of packing; and the samples that fit no row."""
    ((_, rows),), refused = plan_stretches(ruler, indexes, Window(sources, samples, np.zeros_like(samples)))
    return rows, refused


def plan_stretches(ruler: Ruler, indexes: Sequence[SourceIndex], window: Window) -> tuple[list[Group], list[SampleId]]:
    """The rows of each stretch of a window, none with samples of an earlier one but the first; and what fits no row."""
    sources, samples, stretches = window
    parts = [ruler.measure(index, samples[sources == number]) for number, index in enumerate(indexes)]
    for index in indexes:
        index.release()
    measures = Measures(*map(np.concatenate, zip(*parts, strict=True)))
    fits = np.flatnonzero(measures.dropped != REFUSED)
    num_text, num_visual, cost, dropped = (array[fits] for array in measures)

    def row_of(positions: np.ndarray) -> Row:
        row = fits[positions]
        return Row(sources[row], samples[row], dropped[positions], int(cost[positions].sum()))

    packed = pack_in_order(stretches[fits], num_text, num_visual, cost, ruler.seq_length, ruler.pad_segments_to)
    groups = [([*map(row_of, first)], [*map(row_of, others)]) for first, others in packed]
    refused = np.flatnonzero(measures.dropped == REFUSED)
    return groups, list(map(SampleId, sources[refused].tolist(), samples[refused].tolist()))
