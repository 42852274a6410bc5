"""The microbatch that ``blueprint.workload.typical_workload`` counts, as the loader would give it to a rank."""

from dataclasses import replace

import numpy as np
import torch

from navil_megatron.blueprint.image_plan import ImagePlanner, image_token_ids
from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.assemble import RowFormat, assemble
from navil_megatron.data.rank_share import plan_microbatch
from navil_megatron.data.types import DataPlace, EncodedSample, Microbatch, PackedSequence, SampleId


def typical_microbatch(config: NaViLConfig, place: DataPlace, text_tokens: int, image_side: int) -> Microbatch:
    """Full rows of equal samples, which hold a square image, black, and so many tokens of text, one and the same.

    Raises:
        UserError: One sample is longer than a row.
    """
    model, data = config.model, config.data
    planner = ImagePlanner.from_config(data, model.vision)
    (scales,) = planner.plan_images([(image_side, image_side)])
    image_ids = image_token_ids(scales, planner.merge_size, model.special_token_ids)
    plain_id = next(number for number in range(model.language.vocab_size) if number not in model.special_token_ids)
    input_ids = np.concatenate([image_ids, np.full(text_tokens, plain_id, dtype=np.int64)])
    loss_weights = np.repeat(np.array([0, 1], dtype=np.float32), [len(image_ids), text_tokens])
    sample = EncodedSample(sample=SampleId(0, 0), input_ids=input_ids, loss_weights=loss_weights, scales=(scales,))
    if len(input_ids) > data.seq_length:
        raise UserError(
            f"a typical sample, an image of {image_side} x {image_side} pixels and {text_tokens} tokens of text, has "
            f"{len(input_ids)} tokens, and a row data.seq_length = {data.seq_length}; lower data.max_image_pixels"
        )
    samples = (sample,) * (data.seq_length // len(input_ids))
    row_format = RowFormat(
        seq_length=data.seq_length,
        pad_segments_to=config.pad_segments_to,
        pad_id=plain_id,
        special_token_ids=model.special_token_ids,
    )
    rows = assemble([PackedSequence(samples, data.seq_length)] * config.training.micro_batch_size, row_format)
    num_patches = int(rows.image_grid_thw.prod(axis=1).sum())
    pixels = torch.zeros(num_patches, model.vision.patch_dim, dtype=torch.uint8)
    microbatch = plan_microbatch(rows, model, place, pixels)
    if microbatch.pixel_values is None or not place.pins_pixels:
        return microbatch
    return replace(microbatch, pixel_values=microbatch.pixel_values.pin_memory())
