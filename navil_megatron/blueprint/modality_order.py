"""The modality plan: which tokens of a packed microbatch belong to which modality's experts.

Routing in NaViL is by modality, so it is known on the host before the step and is the same in every layer (paper,
section 3.2.2). Hidden states travel in modality-major order, [text tokens | visual tokens]: every projection is then
one plain GEMM per modality on a contiguous view, and only attention needs the tokens in causal order.

Under context parallelism each rank holds every n-th token of each modality, n ranks in all, again [text | visual]:
equally many of both on every rank, and about equally many predictions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from navil_megatron.blueprint.segments import SegmentOrder, inverse_order


@dataclass(frozen=True, slots=True)
class ModalityOrder:
    """One context-parallel rank's view of the plan, as index arrays on the host; t tokens of all these ranks."""

    rows: np.ndarray
    """[t/cp] int64: causal positions of the rank's tokens, in modality-major order."""
    row_of_token: np.ndarray
    """[t] int64: of each causal position its place on this rank; below 0 or from t/cp on: on another."""
    num_text_tokens: int
    """Of each rank, in front of the visual ones."""
    to_attention: np.ndarray
    """[t] int64: the attention order of all ranks' tokens, rank after rank: segment by segment, causal inside each."""
    attention: SegmentOrder
    """The attention segments, of all ranks."""
    sample_tokens: np.ndarray
    """[t/cp] bool: tokens of this rank that are a sample's and no padding."""

    @property
    def is_here(self) -> np.ndarray:
        """[t] bool: causal positions that this rank holds."""
        return (self.row_of_token >= 0) & (self.row_of_token < self.rows.size)


def plan_modality_order(
    visual_token_mask: np.ndarray,
    segment_lengths: Sequence[int],
    cp_size: int = 1,
    sample_tokens: np.ndarray | None = None,
    cp_rank: int = 0,
) -> ModalityOrder:
    """Plan one packed microbatch on the host.

    Args:
        visual_token_mask: [t] bool, in causal order.
        segment_lengths: Tokens of each attention segment, in causal order; they sum to t.
        cp_size: Context-parallel ranks; it divides the tokens of each modality.
        sample_tokens: [t] bool: what is no padding, in causal order; None: all.
        cp_rank: Which of these ranks.
    """
    if sample_tokens is None:
        sample_tokens = np.ones(visual_token_mask.size, dtype=bool)
    if sum(segment_lengths) != visual_token_mask.size:
        raise ValueError(f"segments hold {sum(segment_lengths)} tokens, the row holds {visual_token_mask.size}")
    text, visual = np.flatnonzero(~visual_token_mask), np.flatnonzero(visual_token_mask)
    if text.size % cp_size or visual.size % cp_size:
        raise ValueError(f"{text.size} text and {visual.size} visual tokens do not divide over {cp_size} ranks")
    modality_major = np.concatenate([tokens[r::cp_size] for r in range(cp_size) for tokens in (text, visual)])
    num_rows = modality_major.size // cp_size
    rows = modality_major[cp_rank * num_rows : (cp_rank + 1) * num_rows]
    row_of_all = inverse_order(modality_major)
    attention = SegmentOrder.of(segment_lengths)
    return ModalityOrder(
        rows=rows,
        row_of_token=row_of_all - cp_rank * num_rows,
        num_text_tokens=text.size // cp_size,
        to_attention=row_of_all[attention.order],
        attention=attention,
        sample_tokens=sample_tokens[rows],
    )
