"""From a host-side microbatch to model inputs on a device: where the modality plan and the encoder's plan are made.

Every size that the step needs is an integer on the host here, so nothing on the device is ever asked for a shape.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from navil_megatron.blueprint.image_plan import grids_of
from navil_megatron.blueprint.segments import inverse_order
from navil_megatron.blueprint.vision_plan import images_of_rank, plan_vision
from navil_megatron.config.model import ModelConfig
from navil_megatron.data.types import Microbatch
from navil_megatron.layers.modality import build_packed_seq_params, plan_modality_order
from navil_megatron.models.inputs import FirstStageInputs, ModelInputs
from navil_megatron.training.loss_groups import groups_of


def build_model_inputs(
    microbatch: Microbatch,
    model: ModelConfig,
    device: torch.device,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    cp_rank: int = 0,
    cp_size: int = 1,
    pre_process: bool = True,
) -> ModelInputs:
    """Plan one microbatch for one rank and put it on its device.

    Args:
        microbatch: The packed rows, in causal order.
        model: The model section of the config.
        device: Where the model lives.
        tp_rank: This rank in its tensor-parallel group.
        tp_size: Ranks of the group.
        cp_rank: This rank in its context-parallel group.
        cp_size: Ranks of the group.
        pre_process: Whether the first stage's tensors (tokens, pixels, the encoder's plan) are wanted.
    """

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    order = plan_modality_order(
        microbatch.visual_token_mask, microbatch.segment_lengths, cp_size, microbatch.sample_tokens
    )
    num_rows = order.modality_major.size // cp_size
    mine = order.modality_major[cp_rank * num_rows : (cp_rank + 1) * num_rows]
    to_row = inverse_order(order.modality_major) - cp_rank * num_rows
    is_mine = (to_row >= 0) & (to_row < num_rows)
    predicted = np.flatnonzero((microbatch.labels != -100) & is_mine)
    first_stage = None
    if pre_process:
        is_image = microbatch.input_ids == model.special_token_id("<IMG_CONTEXT>")
        grids = grids_of(microbatch.image_grid_thw)
        vision_plan = plan_vision(grids, model.vision, cp_rank * tp_size + tp_rank, cp_size * tp_size)
        pixel_values, held = _pixels(microbatch, vision_plan.patch_index)
        first_stage = FirstStageInputs(
            input_ids=put(microbatch.input_ids[mine]),
            image_positions=put(to_row[is_image & is_mine]),
            pixel_values=pixel_values.to(device, non_blocking=True),
            vision_plan=replace(
                vision_plan, patch_index=held, feature_index=vision_plan.feature_index[is_mine[is_image]]
            ),
        )
    return ModelInputs(
        packed_seq_params=build_packed_seq_params(order, device, cp_rank),
        position_ids=put(microbatch.position_ids[mine]),
        loss_positions=put(to_row[predicted]),
        labels=put(microbatch.labels[predicted]),
        loss_weights=put(microbatch.loss_weights[predicted]),
        loss_groups=put(groups_of(microbatch)[predicted]),
        first_stage=first_stage,
    )


def needed_images(model: ModelConfig, row_rank: int, row_size: int) -> Callable[[np.ndarray], np.ndarray]:
    """Which scale images, [num_scales] bool, one of the ranks that share a row needs of those with the grids
    [num_scales, 3].
    """
    return lambda grids: images_of_rank(grids_of(grids), model.vision, row_rank, row_size)


def _pixels(microbatch: Microbatch, patch_index: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """The patches at hand, and for each that the encoder wants, counted over all images, its row among them."""
    if microbatch.pixel_values is None:
        raise ValueError("the first stage needs pixel values")
    at_hand = np.repeat(microbatch.has_pixels, microbatch.image_grid_thw.prod(axis=1))
    if not at_hand[patch_index].all():
        raise ValueError("the encoder is to encode images that this rank did not decode")
    return microbatch.pixel_values, (np.cumsum(at_hand) - 1)[patch_index]
