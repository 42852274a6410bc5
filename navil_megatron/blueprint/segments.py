"""Packed attention segments, planned on the host.

Several samples (or images) share one packed row and attend only inside their own segment. Segments of one length are
laid side by side, so that each distinct length costs one dense attention call and no padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class SegmentGroup:
    """Segments of one length, adjacent in attention order."""

    start: int
    """First token of the group, in attention order."""
    num_segments: int
    """How many segments."""
    length: int
    """Tokens of each."""

    @property
    def end(self) -> int:
        """One past the last token of the group."""
        return self.start + self.num_segments * self.length


def group_segments(segment_lengths: Sequence[int]) -> tuple[np.ndarray, tuple[SegmentGroup, ...]]:
    """Order tokens so that segments of equal length are adjacent.

    Args:
        segment_lengths: Tokens of each segment, in row order.

    Returns:
        The attention order, [t] int64 positions in the row, and the groups that it forms, shortest first. Segments keep
        their order inside a group, and tokens theirs inside a segment.
    """
    lengths = np.asarray(segment_lengths, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    by_length = np.argsort(lengths, kind="stable")
    pieces = [np.arange(starts[i], starts[i] + lengths[i]) for i in by_length if lengths[i]]
    order = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    groups = []
    start = 0
    for length, count in zip(*np.unique(lengths[lengths > 0], return_counts=True), strict=True):
        groups.append(SegmentGroup(start, int(count), int(length)))
        start = groups[-1].end
    return order, tuple(groups)


def inverse_order(order: np.ndarray) -> np.ndarray:
    """The permutation that undoes ``order``: x[order][inverse_order(order)] is x. [t] int64."""
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size)
    return inverse
