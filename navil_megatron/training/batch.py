"""From a microbatch on the host to model inputs on the device, when the schedule asks for it."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from navil_megatron.data.types import IGNORED_LABEL, DataPlace, Microbatch
from navil_megatron.layers.modality import build_packed_seq_params
from navil_megatron.models.inputs import EncoderInputs, FirstStageInputs, ModelInputs
from navil_megatron.models.vision_encoder import build_segments
from navil_megatron.runtime.platform import Platform
from navil_megatron.runtime.session import Session


def place_of(session: Session) -> DataPlace:
    """A rank's place, as the data package knows it."""
    return DataPlace(
        dp_rank=session.groups.dp.rank(),
        dp_size=session.groups.dp.size(),
        is_first_stage=session.is_first_stage,
        tp_rank=session.groups.tp.rank(),
        tp_size=session.groups.tp.size(),
        cp_rank=session.groups.cp.rank(),
        cp_size=session.groups.cp.size(),
        pins_pixels=session.platform.name == "cuda",
    )


def upload_ahead(
    microbatches: Sequence[Microbatch],
    platform: Platform,
    *,
    with_images: bool,
    router_loss_scale: Tensor | None = None,
) -> Iterator[ModelInputs]:
    """Each microbatch on the device; while one is used the next is on its way, and no more: two are held, as the
    planner counts.

    ``with_images``: the model chunk that asks embeds tokens and encodes images.
    """
    coming = None
    for microbatch in microbatches:
        following = platform.upload(build_model_inputs(microbatch, with_images, router_loss_scale))
        if coming is not None:
            yield coming()
        coming = following
    if coming is not None:
        yield coming()


def build_model_inputs(
    microbatch: Microbatch, with_images: bool = True, router_loss_scale: Tensor | None = None
) -> ModelInputs:
    """A microbatch as the model takes it, on the host; arguments as of ``upload_ahead``."""
    order = microbatch.modality_order
    predicted = np.flatnonzero((microbatch.labels != IGNORED_LABEL) & order.is_here)
    packed_seq_params = build_packed_seq_params(order)
    packed_seq_params.router_loss_scale = router_loss_scale
    return ModelInputs(
        packed_seq_params=packed_seq_params,
        position_ids=torch.from_numpy(microbatch.position_ids[order.attention.order]),
        loss_positions=torch.from_numpy(order.row_of_token[predicted]),
        labels=torch.from_numpy(microbatch.labels[predicted]),
        loss_weights=torch.from_numpy(microbatch.loss_weights[predicted]),
        loss_groups=torch.from_numpy(microbatch.loss_groups[predicted]),
        first_stage=_first_stage_inputs(microbatch) if with_images else None,
    )


def _first_stage_inputs(microbatch: Microbatch) -> FirstStageInputs:
    plan = microbatch.vision_plan
    if microbatch.pixel_values is None or len(microbatch.pixel_values) != plan.patch_index.size:
        held = 0 if microbatch.pixel_values is None else len(microbatch.pixel_values)
        raise ValueError(f"this rank encodes {plan.patch_index.size} patches, but its microbatch holds {held}")
    images = build_segments(plan.images)
    return FirstStageInputs(
        input_ids=torch.from_numpy(microbatch.input_ids[microbatch.modality_order.rows]),
        image_positions=torch.from_numpy(microbatch.image_rows),
        encoder=EncoderInputs(
            pixel_values=microbatch.pixel_values,
            patch_index=torch.from_numpy(plan.patch_index),
            rows=torch.from_numpy(plan.rows),
            columns=torch.from_numpy(plan.columns),
            images=images,
            windows=images if plan.windows is plan.images else build_segments(plan.windows),
        ),
        feature_index=torch.from_numpy(plan.feature_index),
        gathered_tokens=plan.gathered_tokens,
    )
