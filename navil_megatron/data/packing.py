"""Samples to rows, and rows to ranks: full rows of equal cost, dealt so that no rank waits for another.

Both are list scheduling, longest first: a sample goes to one of the emptiest rows, a row to the rank with the least
work. Where rows would stay part empty that way, the shortest samples wait and fill the gaps by best fit. Best fit alone
makes rows of samples that are alike, from which a model learns far worse when a step has few rows; only rows that hold
two or three samples need it. Every operation is exact and stable, so all machines pack and deal alike.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import ceil

import numpy as np

_TARGET_FILL = 0.998  # share of a row that packing aims at; what does not fit then goes to rows of its own
_GOOD_FILL = 0.985  # share of the rows' tokens under which other ways are tried too
_WAITING = (0.2, 0.5)
"""Shares of the tokens that wait to fill gaps, tried in turn: more fill better where rows hold few samples."""
_WORTH = 0.98  # best fit alone has to do with this share of the rows
_BLOCK = 128  # rows of about equal fill, and samples of about equal length, among which costs are evened out


def pack_rows(
    num_text: np.ndarray, num_visual: np.ndarray, cost: np.ndarray, seq_length: int, pad_segments_to: int
) -> list[np.ndarray]:
    """Rows of sample positions, each ascending; every sample lies in exactly one row.

    Of each sample [n] int64 text tokens, visual tokens and costs, which are evened out over the rows as far as lengths
    allow. The visual segment of a row takes a multiple of ``pad_segments_to``.

    Raises:
        ValueError: a sample is longer than a row.
    """
    packer = _Packer(np.stack([num_text, num_visual, cost]), num_text + num_visual, seq_length, pad_segments_to)
    room = packer.room(num_text, num_visual)
    if room.min(initial=0) < 0:
        longest = int(room.argmin())
        raise ValueError(f"sample {longest} needs {seq_length - room[longest]} tokens, a row holds {seq_length}")
    row_of = packer.level()
    few = packer.tokens.sum() / (_GOOD_FILL * seq_length)
    for waiting in _WAITING:
        if few < _count(row_of):
            row_of = min(row_of, packer.level_and_fit(waiting), key=_count)
    if few < _count(row_of):
        alike = np.zeros_like(row_of)
        packer.fit_best(packer.longest_first(np.arange(len(row_of))), [], alike)
        row_of = alike if _count(alike) <= _WORTH * _count(row_of) else row_of
    order = np.argsort(row_of, kind="stable")
    return [row for row in np.split(order, np.cumsum(np.bincount(row_of))) if len(row)]


def _count(row_of: np.ndarray) -> int:
    return int(row_of.max(initial=-1)) + 1


@dataclass(frozen=True, slots=True)
class _Packer:
    """The ways to pack n samples."""

    loads: np.ndarray  # [3, n] int64: text tokens, visual tokens and cost of each sample
    tokens: np.ndarray  # [n] int64
    seq_length: int
    pad_segments_to: int

    def room[Tokens: (int, np.ndarray)](self, text: Tokens, visual: Tokens) -> Tokens:
        """Tokens that are left of a row with so many; below 0 where they do not fit."""
        return self.seq_length - text - -(-visual // self.pad_segments_to) * self.pad_segments_to

    def longest_first(self, samples: np.ndarray) -> np.ndarray:
        return samples[np.argsort(-self.tokens[samples], kind="stable")]

    def rows_for(self, samples: np.ndarray) -> int:
        return ceil(int(self.tokens[samples].sum()) / (self.seq_length * _TARGET_FILL))

    def level(self) -> np.ndarray:
        """[n] int64: the row of each sample, rows being filled side by side."""
        row_of = np.zeros(len(self.tokens), dtype=np.int64)
        left = self.longest_first(np.arange(len(row_of)))
        num_rows = 0
        while len(left):
            left, rows = self.fill(left, min(len(left), self.rows_for(left)), row_of, num_rows)
            num_rows += len(rows)
        return row_of

    def level_and_fit(self, waiting: float) -> np.ndarray:
        """[n] int64: the row of each sample; the long ones are levelled, the others fill the gaps by best fit."""
        samples = np.arange(len(self.tokens))
        row_of, longest_first = np.zeros_like(samples), self.longest_first(samples)
        waits = self.tokens[longest_first][::-1].cumsum()[::-1] <= waiting * self.tokens.sum()
        refused, rows = self.fill(longest_first[~waits], self.rows_for(samples), row_of, 0)
        self.fit_best(self.longest_first(np.concatenate([refused, longest_first[waits]])), rows, row_of)
        return row_of

    def fill(
        self, samples: np.ndarray, num_rows: int, row_of: np.ndarray, first_row: int
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Lays samples, longest first, into rows; gives those that did not fit, and text and visual tokens of each row.

        A few rows are served at a time, the emptiest ones; fewer towards the end, where rows are levelled.
        """
        filled = np.zeros((3, num_rows), dtype=np.int64)
        refused = [np.zeros(0, dtype=np.int64)]
        place = 0
        while place < len(samples):
            share = 4 if len(samples) - place > 3 * num_rows else 16
            batch = samples[place : place + max(1, num_rows // share)]
            place += len(batch)
            rows = np.argsort(filled[0] + filled[1], kind="stable")[: len(batch)]
            # among rows and samples that are alike in length, the costliest sample meets the cheapest row
            block = np.arange(len(batch)) // _BLOCK
            batch = batch[np.lexsort((-self.loads[2, batch], block))]
            rows = rows[np.lexsort((filled[2, rows], block))]
            after = filled[:, rows] + self.loads[:, batch]
            fits = self.room(after[0], after[1]) >= 0
            refused.append(np.sort(batch[~fits]))
            filled[:, rows[fits]] = after[:, fits]
            row_of[batch[fits]] = first_row + rows[fits]
        return self.longest_first(np.concatenate(refused)), list(map(tuple, filled[:2].T.tolist()))

    def fit_best(self, samples: np.ndarray, rows: list[tuple[int, int]], row_of: np.ndarray) -> None:
        """Lays samples in their order, each into the fullest row that it fits, or into a new one.

        Text and visual tokens of ``rows`` grow; ``row_of`` [n] int64 is filled in.
        """
        rooms = sorted((self.room(*filled), row) for row, filled in enumerate(rows))  # (tokens left, row), ascending
        for sample in samples.tolist():
            text, visual = int(self.loads[0, sample]), int(self.loads[1, sample])
            # padding may hold some of the sample
            place = bisect_left(rooms, (text + visual - self.pad_segments_to + 1, 0))
            room = -1
            while place < len(rooms) and room < 0:
                row = rooms[place][1]
                both = rows[row][0] + text, rows[row][1] + visual
                room = self.room(*both)
                place += 1
            if room >= 0:
                del rooms[place - 1]
                rows[row] = both
            else:
                row = len(rows)
                rows.append((text, visual))
                room = self.room(text, visual)
            row_of[sample] = row
            insort(rooms, (room, row))


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
