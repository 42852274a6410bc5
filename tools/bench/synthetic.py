"""Random microbatches of a wished composition, for tests and benchmarks; assembled by the code that real data takes."""

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch

from navil_megatron.blueprint.image_plan import ScalePlan, image_token_ids
from navil_megatron.config.model import ModelConfig
from navil_megatron.data.assemble import RowFormat, assemble
from navil_megatron.data.rank_share import plan_microbatch
from navil_megatron.data.types import ALONE, DataPlace, EncodedSample, Microbatch, PackedSequence, SampleId

type Composition = Sequence[tuple[int, Sequence[tuple[int, int]]]]
"""For each sample its number of text tokens, and the (rows, columns) in patches of its one-scale images."""


def synthetic_microbatch(
    model: ModelConfig,
    seq_length: int,
    seed: int,
    rows: Sequence[Composition],
    pad_segments_to: int = 16,
    place: DataPlace = ALONE,
) -> Microbatch:
    """Rows of random samples, laid end to end; text tokens follow the images and carry the loss.

    ``seed`` decides text tokens and pixels, which are the same on all ranks. Raises ValueError where a row is overfull.
    """
    random = np.random.default_rng(seed)
    plain_ids = np.setdiff1d(np.arange(model.language.vocab_size), model.special_token_ids)
    index = count()
    encoded = [[_random_sample(model, next(index), *sample, random, plain_ids) for sample in row] for row in rows]
    patches = sum(scale.num_patches for row in encoded for s in row for image in s.scales for scale in image)
    pixels = random.integers(0, 256, (patches, model.vision.patch_dim), dtype=np.uint8)
    row_format = RowFormat(
        seq_length=seq_length,
        pad_segments_to=pad_segments_to,
        pad_id=int(plain_ids[0]),
        special_token_ids=model.special_token_ids,
    )
    sequences = [PackedSequence(tuple(row), seq_length) for row in encoded]
    return plan_microbatch(assemble(sequences, row_format), model, place, torch.from_numpy(pixels))


def _random_sample(
    model: ModelConfig,
    index: int,
    num_text: int,
    grids: Sequence[tuple[int, int]],
    random: np.random.Generator,
    plain_ids: np.ndarray,
) -> EncodedSample:
    """Images, then text tokens; weights differ from token to token, so that a test sees a misplaced one."""
    patch, merge = model.vision.patch_size, model.vision.merge_size
    images = tuple((ScalePlan(rows * patch, columns * patch, rows, columns),) for rows, columns in grids)
    parts = [image_token_ids(scales, merge, model.special_token_ids) for scales in images]
    text = random.choice(plain_ids, num_text).astype(np.int64)
    input_ids = np.concatenate([*parts, text])
    loss_weights = np.zeros(len(input_ids), dtype=np.float32)
    loss_weights[len(input_ids) - num_text :] = random.choice([0.5, 1.0, 2.0], num_text)
    loss_weights[:1] = 0.0
    return EncodedSample(sample=SampleId(0, index), input_ids=input_ids, loss_weights=loss_weights, scales=images)
