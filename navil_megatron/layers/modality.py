"""The modality plan: which rows of a packed microbatch belong to which modality's experts.

Routing in NaViL is by modality, so it is known on the host before the step and is the same in every layer (paper,
section 3.2.2). Hidden states travel in modality-major order, [text tokens | visual tokens]: every projection is then
one plain GEMM per modality on a contiguous view, and only attention needs the tokens in causal order.

Under context parallelism each rank holds every so manieth token of each modality, again [text | visual]: equally many
of both on every rank, and about equally many predictions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from navil_megatron.blueprint.segments import SegmentGroup, group_segments, inverse_order


@dataclass(kw_only=True)
class NaViLPackedSeqParams(PackedSeqParams):
    """The per-microbatch object that megatron-core hands through block, layer, attention and recompute.

    It is an argument, never module state: under 1F1B a module's state would belong to another microbatch.
    """

    num_text_tokens: int
    """Rows of the text segment on a context-parallel rank; the visual segment is the rest."""
    num_packed_tokens: int
    """t/cp, all rows of a context-parallel rank."""
    to_attention: torch.Tensor
    """[t] int64: rows of all context-parallel ranks, one after the other, in attention order, i.e. segment by segment,
    causal inside each."""
    to_modality_major: torch.Tensor
    """[t] int64: the inverse of ``to_attention``."""
    attention_groups: tuple[SegmentGroup, ...]
    """Segments by length, in attention order."""
    sample_tokens: torch.Tensor
    """[t/cp] bool: rows of this rank that are a sample's; the others are padding, which no router balances."""
    router_loss_scale: torch.Tensor | None = None
    """[2] of text and visual: makes a sum over tokens the mean over the global batch, see ``training.step``; None: no
    router has a loss of its own."""

    @property
    def num_visual_tokens(self) -> int:
        """Rows of the visual segment."""
        return self.num_packed_tokens - self.num_text_tokens

    def local_num_text_tokens(self, rank: int, world_size: int) -> int:
        """Text rows in one rank's share of the sequence, when the rows are split evenly over ``world_size`` ranks."""
        share = self.num_packed_tokens // world_size
        return min(max(self.num_text_tokens - rank * share, 0), share)


@dataclass(frozen=True, slots=True)
class ModalityOrder:
    """Host-side result of planning: index arrays, not yet on a device."""

    modality_major: np.ndarray
    """[t] int64: causal positions in modality-major order, one context-parallel rank after the other."""
    num_text_tokens: int
    """Rows of the text segment of each rank."""
    cp_size: int
    """Context-parallel ranks."""
    to_attention: np.ndarray
    """[t] int64: see ``NaViLPackedSeqParams``."""
    attention_groups: tuple[SegmentGroup, ...]
    """Segments by length."""
    sample_tokens: np.ndarray
    """[t] bool: see ``NaViLPackedSeqParams``; of all ranks, one after the other."""


def plan_modality_order(
    visual_token_mask: np.ndarray,
    segment_lengths: Sequence[int],
    cp_size: int = 1,
    sample_tokens: np.ndarray | None = None,
) -> ModalityOrder:
    """Plan one packed microbatch on the host.

    Args:
        visual_token_mask: [t] bool, in causal order.
        segment_lengths: Tokens of each attention segment, in causal order; they sum to t.
        cp_size: Context-parallel ranks; it divides the tokens of each modality.
        sample_tokens: [t] bool: what is no padding, in causal order; None: all.
    """
    if sample_tokens is None:
        sample_tokens = np.ones(visual_token_mask.size, dtype=bool)
    if sum(segment_lengths) != visual_token_mask.size:
        raise ValueError(f"segments hold {sum(segment_lengths)} tokens, the row holds {visual_token_mask.size}")
    text, visual = np.flatnonzero(~visual_token_mask), np.flatnonzero(visual_token_mask)
    if text.size % cp_size or visual.size % cp_size:
        raise ValueError(f"{text.size} text and {visual.size} visual tokens do not divide over {cp_size} ranks")
    modality_major = np.concatenate([tokens[r::cp_size] for r in range(cp_size) for tokens in (text, visual)])
    attention_order, groups = group_segments(segment_lengths)
    return ModalityOrder(
        modality_major=modality_major,
        num_text_tokens=text.size // cp_size,
        cp_size=cp_size,
        to_attention=inverse_order(modality_major)[attention_order],
        attention_groups=groups,
        sample_tokens=sample_tokens[modality_major],
    )


def build_packed_seq_params(order: ModalityOrder, device: torch.device, cp_rank: int = 0) -> NaViLPackedSeqParams:
    """Put a context-parallel rank's plan on its device. Copies only; every size stays on the host."""
    num_rows = order.modality_major.size // order.cp_size
    mine = order.sample_tokens[cp_rank * num_rows : (cp_rank + 1) * num_rows]
    lengths = np.repeat([g.length for g in order.attention_groups], [g.num_segments for g in order.attention_groups])
    cu_seqlens = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    cu_seqlens = cu_seqlens.to(device, non_blocking=True)
    longest = max((group.length for group in order.attention_groups), default=0)
    return NaViLPackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        num_text_tokens=order.num_text_tokens,
        num_packed_tokens=num_rows,
        to_attention=torch.from_numpy(order.to_attention).to(device, non_blocking=True),
        to_modality_major=torch.from_numpy(inverse_order(order.to_attention)).to(device, non_blocking=True),
        attention_groups=order.attention_groups,
        sample_tokens=torch.from_numpy(mine).to(device, non_blocking=True),
    )
