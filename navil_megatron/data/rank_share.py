"""One rank's share of some rows: the one place where a microbatch is planned.

It runs in the loader's threads. The step reads what is found here and plans nothing again.
"""

from dataclasses import fields, replace

import numpy as np
import torch

from navil_megatron.blueprint.image_plan import grids_of
from navil_megatron.blueprint.modality_order import plan_modality_order
from navil_megatron.blueprint.vision_plan import plan_vision
from navil_megatron.config.model import ModelConfig
from navil_megatron.data.loss_groups import groups_of
from navil_megatron.data.types import DataPlace, Microbatch, PackedRows


def plan_microbatch(
    rows: PackedRows, model: ModelConfig, place: DataPlace, pixel_values: torch.Tensor | None = None
) -> Microbatch:
    """What one rank does with some rows.

    Of ``pixel_values``, [p, 3 * patch * patch] patches of all scale images, a rank of the first stage keeps its own;
    None: they come later.
    """
    order = plan_modality_order(
        rows.visual_token_mask, rows.segment_lengths, place.cp_size, rows.sample_tokens, place.cp_rank
    )
    is_here = order.is_here
    # Tensor-parallel ranks count fastest, as in megatron-core's group of both.
    rank, num_ranks = place.cp_rank * place.tp_size + place.tp_rank, place.cp_size * place.tp_size
    plan = plan_vision(grids_of(rows.image_grid_thw), model.vision, rank, num_ranks)
    is_image = rows.input_ids == model.special_token_id("<IMG_CONTEXT>")
    if pixel_values is not None:
        mine = torch.from_numpy(np.repeat(plan.is_mine, rows.image_grid_thw.prod(axis=1)))
        pixel_values = pixel_values[mine] if place.is_first_stage else None
    return Microbatch(
        **{field.name: getattr(rows, field.name) for field in fields(PackedRows)},
        pixel_values=pixel_values,
        vision_plan=replace(plan, feature_index=plan.feature_index[is_here[is_image]]),
        modality_order=order,
        image_rows=order.row_of_token[is_image & is_here],
        loss_groups=groups_of(rows),
        num_visual_tokens=int(np.count_nonzero(rows.visual_token_mask & rows.sample_tokens)),
    )
