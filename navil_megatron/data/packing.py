"""The plan of every step: which samples share a row, and which rows make the global batch. A pure function, no I/O.

Samples are packed into rows once, in a shuffled order. An epoch shuffles the rows and swaps samples of equal length, so
every epoch has the same number of rows, and step s reads its rows from s * batch on in the endless concatenation of
epochs, whoever asks and in whatever order. The data-parallel size appears nowhere but in ``rank_rows``.
"""

from dataclasses import dataclass

import numpy as np

LOOKAHEAD_SAMPLES = 256
"""Samples among which the end of a row looks for one that fits."""


@dataclass(frozen=True, slots=True)
class RowTable:
    """Rows as positions into a list of samples: row r holds ``samples[starts[r]:starts[r + 1]]``."""

    starts: np.ndarray
    """[num_rows + 1] int64."""
    samples: np.ndarray
    """[num_samples] int64."""

    @property
    def num_rows(self) -> int:
        """Rows in the table."""
        return len(self.starts) - 1

    def row(self, number: int) -> np.ndarray:
        """Samples of one row."""
        return self.samples[self.starts[number] : self.starts[number + 1]]


def shuffled(count: int, *seed: int) -> np.ndarray:
    """[count] int64: a permutation that depends on the seed integers alone, also across NumPy versions.

    NumPy promises stable raw bits for a bit generator, but not for ``Generator.permutation``.
    """
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable")


def pack_rows(num_text: np.ndarray, num_visual: np.ndarray, seq_length: int, pad_segments_to: int) -> list[list[int]]:
    """Rows of sample positions, in the order in which the samples come.

    A row takes samples one after another while text tokens plus visual tokens, the latter rounded up to
    ``pad_segments_to``, fit it; what is left at its end goes to the largest of the next ``LOOKAHEAD_SAMPLES`` that fit.
    Sorting by length first would give rows, and so small batches, of one kind.

    Args:
        num_text: [n] text tokens, each sample small enough for a row of its own.
        num_visual: [n] visual tokens.
        seq_length: tokens of a row.
        pad_segments_to: the visual segment of a row is padded to a multiple of this.
    """

    def fits(text: np.ndarray | int, visual: np.ndarray | int) -> np.ndarray | bool:
        return text + -(-visual // pad_segments_to) * pad_segments_to <= seq_length

    rows: list[list[int]] = []
    waiting: list[int] = []
    coming, count = 0, len(num_text)
    total = num_text + num_visual
    while waiting or coming < count:
        row: list[int] = []
        text = visual = 0
        while True:
            refill = min(LOOKAHEAD_SAMPLES - len(waiting), count - coming)
            waiting.extend(range(coming, coming + refill))
            coming += refill
            if not waiting:
                break
            place = 0
            if not fits(text + int(num_text[waiting[0]]), visual + int(num_visual[waiting[0]])):
                window = np.asarray(waiting)
                fitting = np.where(fits(text + num_text[window], visual + num_visual[window]), total[window], 0)
                place = int(fitting.argmax())
                if not fitting[place]:
                    break
            sample = waiting.pop(place)
            row.append(sample)
            text += int(num_text[sample])
            visual += int(num_visual[sample])
        if not row:
            raise ValueError(f"sample {waiting[0]} has {total[waiting[0]]} tokens, a row holds {seq_length}")
        rows.append(row)
    return rows


class DataPlan:
    """The order of all training data: a pure function of (seed, step)."""

    def __init__(
        self,
        samples: np.ndarray,
        num_text: np.ndarray,
        num_visual: np.ndarray,
        *,
        seq_length: int,
        pad_segments_to: int,
        seed: int,
    ) -> None:
        """Packs the rows that every epoch uses.

        Args:
            samples: [n] indices of the usable samples.
            num_text: [n] text tokens of each.
            num_visual: [n] visual tokens of each.
            seq_length: tokens of a row.
            pad_segments_to: the visual segment of a row is padded to a multiple of this.
            seed: decides everything else.
        """
        self.seed = seed
        order = shuffled(len(samples), seed, 0)
        rows = [order[row] for row in pack_rows(num_text[order], num_visual[order], seq_length, pad_segments_to)]
        positions = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        self._starts = np.cumsum([0, *(len(row) for row in rows)])
        self._samples = samples[positions]
        lengths = np.stack([num_text[positions], num_visual[positions]], axis=1)
        self._length_class = np.unique(lengths, axis=0, return_inverse=True)[1].reshape(-1)
        self.num_rows = len(rows)
        """Rows of one epoch."""
        self.fill = float(lengths.sum() / max(1, self.num_rows * seq_length))
        """Share of an epoch's tokens that are not padding."""
        self._cached: dict[int, tuple[RowTable, np.ndarray]] = {}

    def row(self, number: int) -> np.ndarray:
        """Samples of a row of the endless concatenation of epochs."""
        table, order = self._epoch(number // self.num_rows)
        return table.row(int(order[number % self.num_rows]))

    def step_rows(self, step: int, global_batch_size: int) -> list[np.ndarray]:
        """Samples of every row of the global batch of a step."""
        return [self.row(number) for number in range(step * global_batch_size, (step + 1) * global_batch_size)]

    def _epoch(self, epoch: int) -> tuple[RowTable, np.ndarray]:
        """The rows of an epoch and their order."""
        cached = self._cached.get(epoch)
        if cached is not None:
            return cached
        # slots of one length class, in row order, take that class's samples in a fresh random order
        random = shuffled(len(self._samples), self.seed, 1, epoch)
        slots = np.argsort(self._length_class, kind="stable")
        drawn = random[np.argsort(self._length_class[random], kind="stable")]
        samples = np.empty_like(self._samples)
        samples[slots] = self._samples[drawn]
        made = RowTable(self._starts, samples), shuffled(self.num_rows, self.seed, 2, epoch)
        # loader threads ask for neighbouring epochs at most; replacing the dict keeps readers safe without a lock
        self._cached = {**dict(list(self._cached.items())[-1:]), epoch: made}
        return made


def rank_rows[T](rows: list[T], dp_rank: int, dp_size: int, micro_batch_size: int) -> list[list[T]]:
    """The rows of a global batch that one data-parallel rank takes, grouped into microbatches.

    Rank r takes the r-th run of neighbouring rows, so the global batch is the same for any number of ranks.
    """
    per_rank = len(rows) // dp_size
    if per_rank * dp_size != len(rows) or per_rank % micro_batch_size:
        raise ValueError(f"{len(rows)} rows do not divide into {dp_size} ranks x microbatches of {micro_batch_size}")
    mine = rows[dp_rank * per_rank : (dp_rank + 1) * per_rank]
    return [mine[start : start + micro_batch_size] for start in range(0, per_rank, micro_batch_size)]
