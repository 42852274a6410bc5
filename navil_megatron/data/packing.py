"""Samples to rows, and rows to ranks: full rows of equal cost, dealt so that no rank waits for another.

Both are list scheduling, longest first: a sample goes to one of the emptiest rows, a row to the rank with the least
work. Where rows would stay part empty that way, the shortest samples wait and fill the gaps by best fit. Best fit alone
makes rows of samples that are alike, from which a model learns far worse when a step has few rows; only rows that hold
two or three samples need it. Every operation is exact and stable, so all machines pack and deal alike.
"""

from bisect import bisect_left, insort
from heapq import heapify, heappop, heappush
from math import ceil

import numpy as np

_TARGET_FILL = 0.998
"""Share of a row that packing aims at; what does not fit then goes to rows of its own."""
_GOOD_FILL = 0.985
"""Share of the rows' tokens under which other ways are tried too."""
_WAITING = (0.2, 0.5)
"""Shares of the tokens that wait to fill gaps, tried in turn: more fill better where rows hold few samples."""
_WORTH = 0.98
"""Best fit alone has to do with this share of the rows."""
_BLOCK = 128
"""Rows of about equal fill, and samples of about equal length, among which costs are evened out."""


def pack_rows(
    num_text: np.ndarray, num_visual: np.ndarray, cost: np.ndarray, seq_length: int, pad_segments_to: int
) -> list[np.ndarray]:
    """Rows of sample positions, each ascending; every sample lies in exactly one row.

    Args:
        num_text: [n] int64 text tokens of each sample.
        num_visual: [n] int64 visual tokens.
        cost: [n] int64, evened out over the rows as far as lengths allow.
        seq_length: tokens of a row.
        pad_segments_to: the visual segment of a row takes a multiple of this.

    Raises:
        ValueError: a sample is longer than a row.
    """
    needed = num_text + -(-num_visual // pad_segments_to) * pad_segments_to
    if len(needed) and needed.max() > seq_length:
        longest = int(needed.argmax())
        raise ValueError(f"sample {longest} needs {needed[longest]} tokens, a row holds {seq_length}")
    row_of = _level(num_text, num_visual, cost, seq_length, pad_segments_to)
    few = (num_text + num_visual).sum() / (_GOOD_FILL * seq_length)
    for waiting in _WAITING:
        if few < _count(row_of):
            fitted = _level_and_fit(num_text, num_visual, cost, seq_length, pad_segments_to, waiting)
            row_of = min(row_of, fitted, key=_count)
    if few < _count(row_of):
        longest_first = np.argsort(-(num_text + num_visual), kind="stable")
        alike = np.zeros_like(row_of)
        _fit_best(longest_first, num_text, num_visual, seq_length, pad_segments_to, [], alike)
        row_of = alike if _count(alike) <= _WORTH * _count(row_of) else row_of
    order = np.argsort(row_of, kind="stable")
    return [row for row in np.split(order, np.cumsum(np.bincount(row_of))) if len(row)]


def _count(row_of: np.ndarray) -> int:
    return int(row_of.max(initial=-1)) + 1


def _level(
    num_text: np.ndarray, num_visual: np.ndarray, cost: np.ndarray, seq_length: int, pad_segments_to: int
) -> np.ndarray:
    """[n] int64: the row of each sample, rows being filled side by side."""
    row_of = np.zeros(len(num_text), dtype=np.int64)
    left = np.argsort(-(num_text + num_visual), kind="stable")
    num_rows = 0
    while len(left):
        tokens = int((num_text + num_visual)[left].sum())
        rows = _Rows(min(len(left), ceil(tokens / (seq_length * _TARGET_FILL))), seq_length, pad_segments_to)
        left = rows.fill(left, num_text, num_visual, cost, row_of, num_rows)
        num_rows += rows.count
    return row_of


def _level_and_fit(
    num_text: np.ndarray,
    num_visual: np.ndarray,
    cost: np.ndarray,
    seq_length: int,
    pad_segments_to: int,
    waiting: float,
) -> np.ndarray:
    """[n] int64: the row of each sample; the long ones are levelled, the others fill the gaps by best fit."""
    row_of = np.zeros(len(num_text), dtype=np.int64)
    tokens = num_text + num_visual
    longest_first = np.argsort(-tokens, kind="stable")
    waits = tokens[longest_first][::-1].cumsum()[::-1] <= waiting * tokens.sum()
    rows = _Rows(ceil(tokens.sum() / (seq_length * _TARGET_FILL)), seq_length, pad_segments_to)
    refused = rows.fill(longest_first[~waits], num_text, num_visual, cost, row_of, 0)
    left = np.concatenate([refused, longest_first[waits]])
    left = left[np.argsort(-tokens[left], kind="stable")]
    _fit_best(left, num_text, num_visual, seq_length, pad_segments_to, rows.fullness(), row_of)
    return row_of


def _fit_best(
    samples: np.ndarray,
    num_text: np.ndarray,
    num_visual: np.ndarray,
    seq_length: int,
    pad_segments_to: int,
    rows: list[tuple[int, int]],
    row_of: np.ndarray,
) -> None:
    """Lays samples, each into the fullest row that it fits, or into a new one.

    Args:
        samples: their positions, in the order in which they are laid.
        num_text: [n] int64.
        num_visual: [n] int64.
        seq_length: tokens of a row.
        pad_segments_to: see ``pack_rows``.
        rows: text and visual tokens of the rows that are there; grows.
        row_of: [n] int64, filled in.
    """

    def room_of(text: int, visual: int) -> int:
        return seq_length - text - -(-visual // pad_segments_to) * pad_segments_to

    rooms = sorted((room_of(*filled), row) for row, filled in enumerate(rows))  # (tokens left, row), ascending
    for sample in samples.tolist():
        text, visual = int(num_text[sample]), int(num_visual[sample])
        place = bisect_left(rooms, (text + visual - pad_segments_to + 1, 0))  # padding may hold some of the sample
        room = -1
        while place < len(rooms) and room < 0:
            row = rooms[place][1]
            both = rows[row][0] + text, rows[row][1] + visual
            room = room_of(*both)
            place += 1
        if room >= 0:
            del rooms[place - 1]
            rows[row] = both
        else:
            row = len(rows)
            rows.append((text, visual))
            room = room_of(text, visual)
        row_of[sample] = row
        insort(rooms, (room, row))


class _Rows:
    """Some rows that are filled together."""

    def __init__(self, count: int, seq_length: int, pad_segments_to: int) -> None:
        self.count = count
        self._seq_length, self._pad = seq_length, pad_segments_to
        self._text, self._visual, self._cost = (np.zeros(count, dtype=np.int64) for _ in range(3))

    def fullness(self) -> list[tuple[int, int]]:
        """Text and visual tokens of each row."""
        return list(zip(self._text.tolist(), self._visual.tolist(), strict=True))

    def fill(
        self,
        samples: np.ndarray,
        num_text: np.ndarray,
        num_visual: np.ndarray,
        cost: np.ndarray,
        row_of: np.ndarray,
        first_row: int,
    ) -> np.ndarray:
        """Lays samples, longest first, into rows; gives those that did not fit, in the same order.

        A few rows are served at a time, the emptiest ones; fewer towards the end, where rows are levelled.
        """
        refused = [np.zeros(0, dtype=np.int64)]
        place = 0
        while place < len(samples):
            share = 4 if len(samples) - place > 3 * self.count else 16
            batch = samples[place : place + max(1, self.count // share)]
            place += len(batch)
            fullness = self._text + self._visual
            rows = np.argsort(fullness, kind="stable")[: len(batch)]
            # among rows and samples that are alike in length, the costliest sample meets the cheapest row
            block = np.arange(len(batch)) // _BLOCK
            batch = batch[np.lexsort((-cost[batch], block))]
            rows = rows[np.lexsort((self._cost[rows], block))]
            text, visual = self._text[rows] + num_text[batch], self._visual[rows] + num_visual[batch]
            fits = text + -(-visual // self._pad) * self._pad <= self._seq_length
            refused.append(np.sort(batch[~fits]))
            batch, rows = batch[fits], rows[fits]
            self._text[rows], self._visual[rows] = text[fits], visual[fits]
            self._cost[rows] += cost[batch]
            row_of[batch] = first_row + rows
        left = np.concatenate(refused)
        return left[np.argsort(-(num_text + num_visual)[left], kind="stable")]


def deal_rows(costs: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """For each rank the positions of its rows, ascending; every rank gets equally many.

    The costliest row first, each to the rank with the least work that has room.

    Raises:
        ValueError: rows do not divide into ranks.
    """
    per_rank, rest = divmod(len(costs), num_ranks)
    if rest:
        raise ValueError(f"{len(costs)} rows do not divide into {num_ranks} ranks")
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    work = [(0, rank) for rank in range(num_ranks)]
    heapify(work)
    for row in np.argsort(-costs, kind="stable").tolist():
        done, rank = heappop(work)
        ranks[rank].append(row)
        if len(ranks[rank]) < per_rank:
            heappush(work, (done + int(costs[row]), rank))
    return [np.array(sorted(rows), dtype=np.int64) for rows in ranks]


def imbalance(costs: np.ndarray, ranks: list[np.ndarray]) -> float:
    """Largest work of a rank over the mean: 1 is even, and what exceeds it is time that the others wait."""
    work = [int(costs[rows].sum()) for rows in ranks]
    return max(work) * len(work) / max(1, sum(work))
