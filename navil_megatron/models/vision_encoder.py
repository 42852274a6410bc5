"""The visual encoder V_{d,w}: patch embedding, d bidirectional layers, pixel shuffle (paper, section 3.1).

Images of any size and scale are packed into one sequence and attend only inside themselves. Under tensor parallelism a
rank encodes whole scale-images and the features are gathered.
"""

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from navil_megatron.blueprint.segments import SegmentOrder, inverse_order
from navil_megatron.config.vision import VisionConfig
from navil_megatron.layers.kernels import Kernels
from navil_megatron.layers.rope import cos_sin, rotary_angles_2d
from navil_megatron.layers.vision_layer import VisionLayer, VisionSegments
from navil_megatron.models.inputs import EncoderInputs


class VisionEncoder(MegatronModule):
    """This rank's images -> merged tokens, [k, w * merge^2], in encoder order."""

    def __init__(self, vision: VisionConfig, config: TransformerConfig, kernels: Kernels, recompute: bool = False):
        super().__init__(config=config)
        self.vision = vision
        self.recompute = recompute
        self.patch_embedding = nn.Linear(vision.patch_dim, vision.hidden_size, dtype=config.params_dtype)
        self.rows_multiple = kernels.encoder_rows
        self.layers = nn.ModuleList(VisionLayer(vision, kernels, config.params_dtype) for _ in range(vision.num_layers))

    def forward(self, inputs: EncoderInputs) -> Tensor:
        """The images of a microbatch that are this rank's."""
        dtype = self.patch_embedding.weight.dtype
        patches = self.patch_embedding(normalise(inputs.pixel_values.index_select(0, inputs.patch_index)).to(dtype))
        rows, columns, whole_images, windows = inputs.rows, inputs.columns, inputs.images, inputs.windows
        num_patches = patches.shape[0]
        padding = -num_patches % self.rows_multiple
        if padding:
            # Empty patches, a segment of their own.
            patches = nn.functional.pad(patches, (0, 0, 0, padding))
            rows, columns = (nn.functional.pad(places, (0, padding)) for places in (rows, columns))
            whole_images, windows = (segments.padded(num_patches, padding) for segments in (whole_images, windows))
        rotary = cos_sin(rotary_angles_2d(rows, columns, self.vision.head_dim, self.vision.rope_theta))
        kinds = [(segments, segments.in_order(rotary)) for segments in (windows, whole_images)]
        for number, layer in enumerate(self.layers):
            segments, rotary = kinds[number in (self.vision.full_attention_layers or ())]
            if self.recompute and torch.is_grad_enabled():
                patches = torch.utils.checkpoint.checkpoint(
                    layer, patches, rotary, segments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                patches = layer(patches, rotary, segments)
        # Pixel shuffle: patches arrive block by block, so merging a block is a reshape (TL, TR, BL, BR).
        return patches[:num_patches].reshape(-1, self.vision.merged_size)


def normalise(patches: Tensor) -> Tensor:
    """float32 from -1 to 1 of uint8 patches, rounded step by step as the reference rounds; floats are so already."""
    if patches.is_floating_point():
        return patches
    # By a number of the host, CUDA multiplies with its inverse, which rounds differently.
    largest = torch.full((), 255.0, device=patches.device)
    return patches.float().div_(largest).sub_(0.5).div_(0.5)


def build_segments(segments: SegmentOrder) -> VisionSegments:
    """Attention segments as tensors on the host; no index where equal lengths already lie side by side."""
    in_place = segments.is_in_place
    return VisionSegments(
        groups=segments.groups,
        order=None if in_place else torch.from_numpy(segments.order),
        inverse=None if in_place else torch.from_numpy(inverse_order(segments.order)),
        cu_seqlens=torch.from_numpy(segments.cu_seqlens),
    )
