"""One layer of the visual encoder: bidirectional attention inside packed segments, GELU FFN, LayerScale.

Reference behaviour: multi-head attention with fused (query, key, value) rows, exact GELU, a per-channel scale on both
residual branches, no bias on the fused projection unless asked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from navil_megatron.blueprint.segments import SegmentGroup
from navil_megatron.config.vision import VisionConfig
from navil_megatron.layers.attention_heads import AttentionHeads
from navil_megatron.layers.kernels import FusedHeads, Kernels
from navil_megatron.layers.reorder import Reorder

FUSED = FusedHeads((1, 1, 1), dim=1)


class VisionLayer(nn.Module):
    """[p, w] -> [p, w]. The encoder is not tensor parallel: each rank runs whole images (see ``VisionEncoder``)."""

    def __init__(self, config: VisionConfig, kernels: Kernels, dtype: torch.dtype):
        super().__init__()
        width = config.hidden_size
        norm, linear = kernels.norms[config.norm], kernels.linear
        self.num_heads = config.num_attention_heads
        self.kernels, self.precision = kernels, kernels.encoder_precision
        self.norm1 = norm(width, eps=config.norm_epsilon, dtype=dtype)
        self.linear_qkv = linear(width, 3 * width, bias=config.qkv_bias, dtype=dtype)
        self.linear_proj = linear(width, width, dtype=dtype)
        self.layer_scale1 = nn.Parameter(torch.empty(width, dtype=dtype))
        self.norm2 = norm(width, eps=config.norm_epsilon, dtype=dtype)
        self.linear_fc1 = linear(width, config.ffn_hidden_size, dtype=dtype)
        self.linear_fc2 = linear(config.ffn_hidden_size, width, dtype=dtype)
        self.layer_scale2 = nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, patches: Tensor, rotary: Tensor, segments: "VisionSegments") -> Tensor:
        """patches [p, w] in encoder order; rotary [p, 2, d/2] in attention order."""
        with self.precision():
            patches = patches + self._attend(self.norm1(patches), rotary, segments) * self.layer_scale1
            hidden = nn.functional.gelu(self.linear_fc1(self.norm2(patches)))
            return patches + self.linear_fc2(hidden) * self.layer_scale2

    def _attend(self, normed: Tensor, rotary: Tensor, segments: "VisionSegments") -> Tensor:
        qkv = self.linear_qkv(normed).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = AttentionHeads.apply(
            qkv, None, None, 0.0, segments.order, segments.inverse, rotary, FUSED, self.kernels
        )
        context = self.kernels.segment_attention(
            query,
            key,
            value,
            groups=segments.groups,
            cu_seqlens=segments.cu_seqlens,
            max_seqlen=segments.max_seqlen,
            causal=False,
        )
        if segments.inverse is not None:
            context = Reorder.apply(context, segments.inverse, segments.order)
        projected: Tensor = self.linear_proj(context)
        return projected


@dataclass(frozen=True, slots=True)
class VisionSegments:
    """Which patches attend to each other in one kind of layer."""

    groups: tuple[SegmentGroup, ...]
    """Segments of equal length, adjacent in attention order."""
    order: Tensor | None
    """[p] rows in attention order, or None where the encoder order already is."""
    inverse: Tensor | None
    """[p] the way back, or None."""
    cu_seqlens: Tensor
    """[num_segments + 1] int32, in attention order."""

    @property
    def max_seqlen(self) -> int:
        """Patches of the longest segment."""
        return max((group.length for group in self.groups), default=0)

    def in_order(self, patches: Tensor) -> Tensor:
        """[p, ...] in encoder order -> in attention order."""
        return patches if self.order is None else patches.index_select(0, self.order)

    def padded(self, num_patches: int, padding: int) -> "VisionSegments":
        """The same with so many more patches at the end, a segment of their own."""
        end = torch.arange(num_patches, num_patches + padding, device=self.cu_seqlens.device)
        return VisionSegments(
            groups=(*self.groups, SegmentGroup(num_patches, 1, padding)),
            order=None if self.order is None else torch.cat([self.order, end]),
            inverse=None if self.inverse is None else torch.cat([self.inverse, end]),
            cu_seqlens=nn.functional.pad(self.cu_seqlens, (0, 1), value=num_patches + padding),
        )
