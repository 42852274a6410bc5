"""The data contract: what each step of the pipeline hands to the next.

shards.RawSample -> encode.EncodedSample -> packing.PackedSequence -> loader.Microbatch
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class RawSample:
    """One member group of a shard, as bytes."""

    shard: str
    """Path of the shard."""
    key: str
    """Name of the sample inside the shard."""
    images: tuple[bytes, ...]
    """Encoded image files, in order of appearance."""
    caption: str
    """Text that follows the image."""


@dataclass(frozen=True, slots=True)
class ScalePlan:
    """One scale of one image: what to resize to and how many patches result."""

    resized_height: int
    """Pixels after resizing, before padding."""
    resized_width: int
    """Pixels after resizing, before padding."""
    grid_height: int
    """Patches down, after padding to whole merge blocks."""
    grid_width: int
    """Patches across, after padding to whole merge blocks."""


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """Token ids and image plans of one sample; no pixel has been touched."""

    sample_index: int
    """Position in the index of the source."""
    input_ids: np.ndarray
    """[n] int64."""
    loss_weights: np.ndarray
    """[n] float32: the weight of *predicting* input_ids[i]; 0 on image tokens and on the first token."""
    scales: tuple[tuple[ScalePlan, ...], ...]
    """For each image its scales, small to large."""


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """One row: samples laid end to end, then padding."""

    samples: tuple[EncodedSample, ...]
    """In row order."""
    seq_length: int
    """Tokens of the row, padding included."""


@dataclass(frozen=True, slots=True)
class Microbatch:
    """What one forward pass of one rank needs. Arrays are on the host and in causal order; t = rows * seq_length."""

    input_ids: np.ndarray
    """[t] int64."""
    position_ids: np.ndarray
    """[t] int64, from 0 in every sample."""
    labels: np.ndarray
    """[t] int64: the token that follows in the same sample, -100 where there is none or its weight is 0."""
    loss_weights: np.ndarray
    """[t] float32: the weight of labels[i]; 0 where labels is -100."""
    visual_token_mask: np.ndarray
    """[t] bool: tokens for the visual experts, i.e. <IMG_CONTEXT>, <img> and visual padding."""
    segment_lengths: tuple[int, ...]
    """Tokens of each attention segment, first to last; they sum to t. Samples, then padding, row by row."""
    image_grid_thw: np.ndarray
    """[num_scales, 3] int64: frames, patch rows, patch columns of every scale image, in order of appearance."""
    pixel_values: torch.Tensor | None
    """[p, 3 * patch * patch] float32, patches in 2x2-merge-block order; None where the stage does not decode."""
    num_tokens: int
    """Tokens that are not padding."""
    sample_indices: tuple[int, ...]
    """Which samples, in order."""
    sample_lengths: tuple[int, ...]
    """Tokens of each sample: its attention segment."""
