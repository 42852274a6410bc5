"""One sample to token ids and loss weights, image tokens in their places; no picture is read."""

from typing import Literal

import numpy as np

from navil_megatron.blueprint.image_plan import ScalePlan, image_token_ids
from navil_megatron.data.tokenizer import SampleTokenizer
from navil_megatron.data.types import Content, EncodedSample, SampleId


def encode_sample(
    sample: SampleId,
    content: Content,
    scales: tuple[tuple[ScalePlan, ...], ...],
    tokenizer: SampleTokenizer,
    merge_size: int,
    image_text_loss: Literal["all", "after_image"] = "all",
) -> EncodedSample:
    """Token ids and loss weights of a sample; ``scales`` are those of each image, small to large.

    ``image_text_loss``: as ``data.image_text_loss``.

    Raises:
        UserError: a conversation, but the tokenizer has no tokens for turns.
        ValueError: the content has places for more or fewer images than there are.
    """
    pieces = tokenizer.pieces(content, len(scales))
    if sum(piece.image for piece in pieces) != len(scales):
        raise ValueError(f"{len(scales)} images for {sum(piece.image for piece in pieces)} places")
    images = (image_token_ids(image, merge_size, tokenizer.special_token_ids) for image in scales)
    parts = [next(images) if piece.image else np.array(piece.ids, dtype=np.int64) for piece in pieces]
    loss = [piece.loss for piece in pieces]
    if image_text_loss == "after_image" and scales and not isinstance(content, tuple):
        first_image = [piece.image for piece in pieces].index(True)
        loss[:first_image] = [False] * first_image
    loss_weights = np.repeat(loss, [len(part) for part in parts]).astype(np.float32)
    loss_weights[:1] = 0.0  # nothing predicts the first token
    return EncodedSample(sample=sample, input_ids=np.concatenate(parts), loss_weights=loss_weights, scales=scales)


def blank_sample(
    sample: SampleId,
    num_text_tokens: int,
    scales: tuple[tuple[ScalePlan, ...], ...],
    tokenizer: SampleTokenizer,
    merge_size: int,
    damage: str,
) -> EncodedSample:
    """As many tokens as the plan counts on, for a sample whose text cannot be read: its images, and padding."""
    images = [image_token_ids(image, merge_size, tokenizer.special_token_ids) for image in scales]
    input_ids = np.concatenate([*images, np.full(num_text_tokens, tokenizer.pad_id, dtype=np.int64)])
    return EncodedSample(sample, input_ids, np.zeros(len(input_ids), dtype=np.float32), scales, damage)
