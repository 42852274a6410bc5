"""The modality plan as the layers take it: see ``blueprint.modality_order``."""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from navil_megatron.blueprint.modality_order import ModalityOrder
from navil_megatron.blueprint.segments import SegmentGroup, inverse_order


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
    is_visual: torch.Tensor
    """[t] bool, in attention order."""
    attention_groups: tuple[SegmentGroup, ...]
    """Segments by length, in attention order."""
    sample_tokens: torch.Tensor
    """[t/cp] bool: rows of this rank that are a sample's; the others are padding, which no router balances."""
    router_loss_scale: torch.Tensor | None = None
    """[2] of text and visual: makes a sum over tokens the mean over the global batch, see ``training.step``; None: no
    router has a loss of its own."""

    def local_num_text_tokens(self, rank: int, world_size: int) -> int:
        """Text rows in one rank's share of the sequence, when the rows are split evenly over ``world_size`` ranks."""
        share = self.num_packed_tokens // world_size
        return min(max(self.num_text_tokens - rank * share, 0), share)


def build_packed_seq_params(order: ModalityOrder) -> NaViLPackedSeqParams:
    """A context-parallel rank's plan as tensors on the host."""
    cu_seqlens = torch.from_numpy(order.attention.cu_seqlens)
    return NaViLPackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=order.attention.longest,
        max_seqlen_kv=order.attention.longest,
        num_text_tokens=order.num_text_tokens,
        num_packed_tokens=order.rows.size,
        to_attention=torch.from_numpy(order.to_attention),
        to_modality_major=torch.from_numpy(inverse_order(order.to_attention)),
        # Every context-parallel rank holds as many text tokens.
        is_visual=torch.from_numpy(order.to_attention % max(order.rows.size, 1) >= order.num_text_tokens),
        attention_groups=order.attention.groups,
        sample_tokens=torch.from_numpy(order.sample_tokens),
    )
