"""The microbatch that ``blueprint.workload.typical_workload`` counts, as the loader would give it to a rank."""

from dataclasses import replace

import numpy as np
import torch

from navil_megatron.blueprint.image_plan import ImagePlanner, image_token_ids
from navil_megatron.blueprint.workload import typical_sample
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.assemble import RowFormat, assemble
from navil_megatron.data.rank_share import plan_microbatch
from navil_megatron.data.types import DataPlace, EncodedSample, Microbatch, PackedSequence, SampleId


def typical_microbatch(config: NaViLConfig, place: DataPlace, text_tokens: int, image_side: int) -> Microbatch:
    """Full rows of equal samples as of ``typical_sample``: the image is black, the text one token again and again."""
    model, data = config.model, config.data
    planner = ImagePlanner.from_config(data, model.vision)
    scales, text_tokens = typical_sample(config, text_tokens, image_side)
    image_ids = image_token_ids(scales, planner.merge_size, model.special_token_ids)
    plain_id = next(number for number in range(model.language.vocab_size) if number not in model.special_token_ids)
    input_ids = np.concatenate([image_ids, np.full(text_tokens, plain_id, dtype=np.int64)])
    loss_weights = np.repeat(np.array([0, 1], dtype=np.float32), [len(image_ids), text_tokens])
    sample = EncodedSample(sample=SampleId(0, 0), input_ids=input_ids, loss_weights=loss_weights, scales=(scales,))
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
