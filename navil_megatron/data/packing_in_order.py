"""Rows of stretches of samples, one stretch after another: what is left of a row at an end is filled from the next.

Small sets begin an epoch every few rows. Rows of one epoch alone would be part empty, rows of several at once would
hold a sample twice before others came at all.
"""

import numpy as np

from navil_megatron.data.order import shuffled
from navil_megatron.data.packing import pack_rows

_MANY_ROWS = 32  # a stretch of so many loses little where its rows are levelled
_KEPT_FILL = 0.97  # share of the rows of a shorter one that is filled for sure; the rest waits for the next stretch

type Packed = tuple[list[np.ndarray], list[np.ndarray]]
"""Rows that must come first, and rows in any order; of sample positions."""


def pack_in_order(
    stretches: np.ndarray,
    num_text: np.ndarray,
    num_visual: np.ndarray,
    cost: np.ndarray,
    seq_length: int,
    pad_segments_to: int,
) -> list[Packed]:
    """The rows of each stretch; a first row begins with the last samples of the stretches before it.

    ``stretches`` [n] int64 counts from 0; the others are as of ``pack_rows``, which packs what has but one.
    """
    tokens = num_text + num_visual

    def fits(text: int, visual: int) -> bool:
        return text + -(-visual // pad_segments_to) * pad_segments_to <= seq_length

    def pack(positions: np.ndarray) -> list[np.ndarray]:
        positions = np.sort(positions)
        loads = num_text[positions], num_visual[positions], cost[positions]
        return [positions[row] for row in pack_rows(*loads, seq_length, pad_segments_to)]

    def fill(row: list[int], positions: np.ndarray) -> np.ndarray:
        """Lays samples into a row as long as some fit, in their order; gives the others."""
        text, visual = int(num_text[row].sum()), int(num_visual[row].sum())
        shortest, stays = int(tokens[positions].min(initial=seq_length)), np.ones(len(positions), dtype=bool)
        for place, position in enumerate(positions.tolist()):
            if text + visual + shortest > seq_length:
                break
            if fits(text + int(num_text[position]), visual + int(num_visual[position])):
                text, visual = text + int(num_text[position]), visual + int(num_visual[position])
                row.append(position)
                stays[place] = False
        return positions[stays]

    found: list[Packed] = []
    last = int(stretches.max(initial=0))
    ends = np.cumsum(np.bincount(stretches, minlength=last + 1))
    begun: list[int] = []  # a row with samples of earlier stretches
    for stretch, positions in enumerate(np.split(np.argsort(stretches, kind="stable"), ends[:-1])):
        first: list[np.ndarray] = []
        positions = positions[shuffled(len(positions), stretch)]  # so that no source waits more often than others
        if begun:
            positions = fill(begun, positions)
            if stretch < last and not len(positions):
                found.append(([], []))
                continue
            first, begun = [np.array(begun, dtype=np.int64)], []
        num_rows, rest = divmod(int(tokens[positions].sum()), seq_length)
        if stretch < last and num_rows < _MANY_ROWS:
            fill(begun, _tail(positions, tokens, rest + int((1 - _KEPT_FILL) * num_rows * seq_length)))
            positions = positions[~np.isin(positions, begun)]
        rows = pack(positions)
        if stretch < last and rows:  # what is left over may yet fit into the row that waits
            emptiest = min(range(len(rows)), key=lambda row: int(tokens[rows[row]].sum()))
            together = [*begun, *rows[emptiest].tolist()]
            if len(rows) > num_rows and fits(int(num_text[together].sum()), int(num_visual[together].sum())):
                begun = together
                del rows[emptiest]
        found.append((first, rows))
    return found


def _tail(positions: np.ndarray, tokens: np.ndarray, limit: int) -> np.ndarray:
    """The last samples, as many as it takes to have so many tokens together."""
    own = tokens[positions]
    return positions[own[::-1].cumsum()[::-1] - own < limit]
