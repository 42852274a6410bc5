"""Packed attention segments, planned on the host.

Several samples (or images) share one packed row and attend only inside their own segment. Segments of one length are
laid side by side, so that each distinct length costs one dense attention call and no padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True, slots=True)
class SegmentGroup:
    """Segments of one length, adjacent in attention order."""

    start: int
    """First token of the group, in attention order."""
    num_segments: int
    length: int
    """Tokens of each."""

    @property
    def end(self) -> int:
        """One past the last token of the group."""
        return self.start + self.num_segments * self.length


@dataclass(frozen=True, slots=True)
class SegmentOrder:
    """Attention order of t tokens: segments of equal length lie side by side, shortest first. Segments keep their order
    inside a group, and tokens theirs inside a segment.
    """

    groups: tuple[SegmentGroup, ...]
    """Segments by length, in attention order."""
    order: np.ndarray
    """[t] int64: positions in the row, in attention order."""
    cu_seqlens: np.ndarray
    """[num_segments + 1] int32, in attention order; empty segments are left out."""

    @classmethod
    def of(cls, segment_lengths: Sequence[int]) -> Self:
        """Of segments that lie in a row with these lengths, in tokens."""
        lengths = np.asarray(segment_lengths, dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        by_length = np.argsort(lengths, kind="stable")
        pieces = [np.arange(starts[i], starts[i] + lengths[i]) for i in by_length]
        groups: list[SegmentGroup] = []
        for length, count in zip(*np.unique(lengths[lengths > 0], return_counts=True), strict=True):
            groups.append(SegmentGroup(groups[-1].end if groups else 0, int(count), int(length)))
        ends = np.cumsum(np.sort(lengths[lengths > 0]))
        return cls(
            groups=tuple(groups),
            order=np.concatenate([np.zeros(0, dtype=np.int64), *pieces]),
            cu_seqlens=np.concatenate([[0], ends]).astype(np.int32),
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return self.groups[-1].length if self.groups else 0

    @property
    def is_in_place(self) -> bool:
        """Whether the row lies in attention order already."""
        return bool((self.order[1:] > self.order[:-1]).all())


def inverse_order(order: np.ndarray) -> np.ndarray:
    """The permutation that undoes ``order``: x[order][inverse_order(order)] is x. [t] int64."""
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size)
    return inverse
