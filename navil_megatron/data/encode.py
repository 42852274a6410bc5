"""One sample to token ids: image tokens, caption, end token; and which samples of a source fit a row at all.

Lengths come from the index alone, so a whole source is planned without reading a picture. A sample longer than a row is
left out, counted and named, never cut. Loss lies on the caption and its end (spec, section 1.5).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from navil_megatron.config.errors import UserError
from navil_megatron.config.schema import NaViLConfig
from navil_megatron.data.image_plan import (
    ImagePlanner,
    ImageSizeError,
    count_image_tokens,
    image_token_ids,
    visual_tokens,
)
from navil_megatron.data.shards import ShardSet
from navil_megatron.data.tokenizer import CaptionTokenizer, load_tokenizer
from navil_megatron.data.types import EncodedSample, ScalePlan


class SampleTooLongError(UserError):
    """A sample that does not fit a row."""


@dataclass(frozen=True, slots=True)
class SampleSizes:
    """Tokens of every sample of a source; n is the number of samples."""

    num_text: np.ndarray
    """[n] int64: tokens for the text experts, line and frame breaks and the end token included."""
    num_visual: np.ndarray
    """[n] int64: tokens for the visual experts, i.e. <IMG_CONTEXT> and <img>."""
    usable: np.ndarray
    """[n] bool: fits a row."""


class SampleEncoder:
    """What turns samples into tokens in one run: tokenizer, image planner and row length."""

    def __init__(self, config: NaViLConfig) -> None:
        """Loads the tokenizer.

        Raises:
            UserError: it does not fit the model.
        """
        self.tokenizer: CaptionTokenizer = load_tokenizer(config.data.tokenizer, config.model.special_token_ids)
        if self.tokenizer.vocab_size > config.model.language.vocab_size:
            raise UserError(
                f"tokenizer {config.data.tokenizer} has ids up to {self.tokenizer.vocab_size - 1}, but "
                f"model.language.vocab_size is {config.model.language.vocab_size}: set it to "
                f"{self.tokenizer.vocab_size} or more"
            )
        self.planner = ImagePlanner.from_config(config.data, config.model.vision)
        self.seq_length = config.data.seq_length
        self.pad_segments_to = config.data.pad_segments_to

    def row_tokens(self, num_text: np.ndarray | int, num_visual: np.ndarray | int) -> np.ndarray | int:
        """Tokens that a row needs for so many text and visual tokens, the visual segment padded."""
        return num_text + -(-num_visual // self.pad_segments_to) * self.pad_segments_to

    def encode(self, shards: ShardSet, index: int) -> EncodedSample:
        """Token ids, loss weights and image plan of one sample; reads its caption, not its picture.

        Raises:
            SampleTooLongError: it does not fit a row.
        """
        record = shards.records[index]
        sizes = [(int(record["height"]), int(record["width"]))] if record["image_bytes"] else []
        images = self.planner.plan_images(sizes)
        sample = encode_sample(index, shards.caption(index), images, self.tokenizer, self.planner.merge_size)
        num_visual = int(visual_tokens(sample.input_ids, self.tokenizer.special_token_ids).sum())
        needed = self.row_tokens(len(sample.input_ids) - num_visual, num_visual)
        if needed > self.seq_length:
            raise SampleTooLongError(self._too_long(shards, index, int(needed)))
        return sample

    def measure(self, shards: ShardSet) -> SampleSizes:
        """Tokens of every sample, from the index."""
        num_text = shards.caption_tokens(self.tokenizer.counter) + 1  # the end token
        num_visual = np.zeros(len(shards), dtype=np.int64)
        usable = np.ones(len(shards), dtype=bool)
        sizes = np.stack([shards.records["height"], shards.records["width"]], axis=1).astype(np.int64)
        distinct, which = np.unique(sizes, axis=0, return_inverse=True)
        counts = np.array([self._image_tokens(int(height), int(width)) for height, width in distinct]).reshape(-1, 2)
        has_image = shards.records["image_bytes"] > 0
        tokens = counts[which.reshape(-1)]
        num_text[has_image] += tokens[has_image, 0]
        num_visual[has_image] = tokens[has_image, 1]
        usable &= self.row_tokens(num_text, num_visual) <= self.seq_length
        return SampleSizes(num_text=num_text, num_visual=num_visual, usable=usable)

    def describe_rejected(self, shards: ShardSet, sizes: SampleSizes) -> str | None:
        """One line that counts the samples which fit no row and names the first; ``None`` when all fit."""
        rejected = np.flatnonzero(~sizes.usable)
        if not len(rejected):
            return None
        first = int(rejected[0])
        needed = int(self.row_tokens(sizes.num_text[first], sizes.num_visual[first]))
        why = self._too_long(shards, first, needed)
        return f"{len(rejected)} of {len(shards)} samples are left out; the first: {why}"

    def _too_long(self, shards: ShardSet, index: int, needed: int) -> str:
        return (
            f"{shards.shard_of(index)}: {shards.key(index)} needs {needed} tokens, but a row holds {self.seq_length}: "
            "raise data.seq_length or lower data.max_image_pixels"
        )

    def _image_tokens(self, height: int, width: int) -> tuple[int, int]:
        """(text, visual) tokens of an image; none for size 0, and more than any row for one that cannot be planned."""
        if height == 0:
            return 0, 0
        try:
            scales = self.planner.plan_images([(height, width)])[0]
        except ImageSizeError:
            return self.seq_length + 1, 0
        return count_image_tokens(scales, self.planner.merge_size)


def encode_sample(
    index: int,
    caption: str,
    images: Sequence[Sequence[ScalePlan]],
    tokenizer: CaptionTokenizer,
    merge_size: int,
) -> EncodedSample:
    """Images in order, then the caption, then the end token; loss on the last two."""
    parts = [image_token_ids(scales, merge_size, tokenizer.special_token_ids) for scales in images]
    image_length = sum(len(part) for part in parts)
    text = np.array([*tokenizer.encode(caption), tokenizer.end_id], dtype=np.int64)
    loss_weights = np.ones(image_length + len(text), dtype=np.float32)
    loss_weights[: max(image_length, 1)] = 0.0  # nothing predicts the first token
    return EncodedSample(
        sample_index=index,
        input_ids=np.concatenate([*parts, text]),
        loss_weights=loss_weights,
        scales=tuple(tuple(scales) for scales in images),
    )
