"""The visual encoder V_{d,w}: patch embedding, d bidirectional layers, pixel shuffle (paper, section 3.1).

Images of any size and scale are packed into one sequence and attend only inside themselves. Under tensor parallelism a
rank encodes whole scale-images and the features are gathered.
"""

import numpy as np
import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from navil_megatron.blueprint.segments import group_segments, inverse_order
from navil_megatron.blueprint.vision_plan import VisionPlan
from navil_megatron.config.vision import VisionConfig
from navil_megatron.kernels.provider import Kernels
from navil_megatron.layers.rope import cos_sin, rotary_angles_2d
from navil_megatron.layers.vision_layer import VisionKernels, VisionLayer, VisionSegments


class VisionEncoder(MegatronModule):
    """This rank's images -> merged tokens, [k, w * merge^2], in encoder order."""

    def __init__(
        self,
        vision: VisionConfig,
        config: TransformerConfig,
        kernels: Kernels,
        recompute: bool = False,
    ):
        super().__init__(config=config)
        self.vision = vision
        self.recompute = recompute
        self.patch_embedding = nn.Linear(vision.patch_dim, vision.hidden_size, dtype=config.params_dtype)
        self.rows_multiple = kernels.encoder_rows
        chosen = VisionKernels(
            kernels.segment_attention, kernels.linear, kernels.encoder_norms, kernels.encoder_precision
        )
        self.layers = nn.ModuleList(VisionLayer(vision, chosen, config.params_dtype) for _ in range(vision.num_layers))

    def forward(self, pixel_values: Tensor, plan: VisionPlan) -> Tensor:
        """pixel_values [patches of the microbatch, patch_dim]; ``plan`` says which of them are this rank's."""
        device, dtype = self.patch_embedding.weight.device, self.patch_embedding.weight.dtype
        index = torch.from_numpy(plan.patch_index).to(device, non_blocking=True)
        patches = self.patch_embedding(pixel_values.index_select(0, index).to(dtype))
        num_patches = patches.shape[0]
        padding = -num_patches % self.rows_multiple
        if padding:
            # Empty patches, a segment of their own.
            patches = nn.functional.pad(patches, (0, 0, 0, padding))
        rows, columns = (
            torch.from_numpy(np.pad(x, (0, padding))).to(device, non_blocking=True) for x in (plan.rows, plan.columns)
        )
        rotary = cos_sin(rotary_angles_2d(rows, columns, self.vision.head_dim, self.vision.rope_theta), dtype)
        whole_images = build_segments((*plan.image_segments, padding), device)
        windows = whole_images
        if self.vision.full_attention_layers is not None:
            windows = build_segments((*plan.window_segments, padding), device)
        for number, layer in enumerate(self.layers):
            segments = whole_images if number in (self.vision.full_attention_layers or ()) else windows
            if self.recompute and torch.is_grad_enabled():
                patches = torch.utils.checkpoint.checkpoint(
                    layer, patches, rotary, segments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                patches = layer(patches, rotary, segments)
        # Pixel shuffle: patches arrive block by block, so merging a block is a reshape (TL, TR, BL, BR).
        return patches[:num_patches].reshape(-1, self.vision.merged_size)


def build_segments(lengths: tuple[int, ...], device: torch.device) -> VisionSegments:
    """Attention segments on a device; no index where equal lengths already lie side by side."""
    order, groups = group_segments(lengths)
    in_place = bool((order[1:] > order[:-1]).all())
    flat = [group.length for group in groups for _ in range(group.num_segments)]
    cu_seqlens = torch.tensor([0, *flat], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return VisionSegments(
        groups=groups,
        order=None if in_place else torch.from_numpy(order).to(device, non_blocking=True),
        inverse=None if in_place else torch.from_numpy(inverse_order(order)).to(device, non_blocking=True),
        cu_seqlens=cu_seqlens.to(device, non_blocking=True),
    )
