"""The data contract: what each step of the pipeline hands to the next.

RawSample -> EncodedSample -> PackedSequence -> PackedRows -> Microbatch
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch

from navil_megatron.blueprint.image_plan import ScalePlan, grids_of
from navil_megatron.blueprint.modality_order import ModalityOrder
from navil_megatron.blueprint.vision_plan import VisionPlan
from navil_megatron.blueprint.workload import Workload

IGNORED_LABEL = -100


class SampleId(NamedTuple):
    """One sample of a run: its source's place in the config, and its own in the source's index."""

    source: int
    number: int


@dataclass(frozen=True, slots=True)
class DataPlace:
    """Where a rank stands, as plain numbers: the data package knows nothing of process groups."""

    dp_rank: int = 0
    dp_size: int = 1
    is_first_stage: bool = True
    """Holds the encoder, and so needs pixels."""
    tp_rank: int = 0
    tp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    pins_pixels: bool = False
    """Pixels lie where a GPU fetches them while the host goes on."""


ALONE = DataPlace()


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | None, ...]
    """Text, and ``None`` where the next image stands."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document with images in its text."""

    parts: tuple[str | None, ...]
    """Text, and ``None`` where the next image stands."""


type Content = str | Document | tuple[Turn, ...]
"""A caption or text, which follows the images; or a document or conversation, which says where they stand."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample as its shard holds it."""

    shard: str
    """Path or URL."""
    key: str
    """Name inside the shard."""
    images: tuple[bytes, ...]
    """Encoded image files, in order of appearance; empty where they were not read."""
    content: Content


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """Token ids and image plans of one sample; no pixel has been touched."""

    sample: SampleId
    input_ids: np.ndarray
    """[n] int64."""
    loss_weights: np.ndarray
    """[n] float32: the weight of *predicting* input_ids[i]; 0 on image tokens and on the first token."""
    scales: tuple[tuple[ScalePlan, ...], ...]
    """For each image its scales, small to large."""
    damage: str = ""
    """Why the text could not be read; then padding stands for it, without loss."""


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """One row: samples laid end to end, then padding."""

    samples: tuple[EncodedSample, ...]
    seq_length: int
    """Tokens of the row, padding included."""


@dataclass(frozen=True, slots=True)
class FailedSample:
    """A sample of a microbatch whose text or image could not be read: blank, and without loss."""

    position: int
    """Which sample of the microbatch, from 0."""
    shard: str
    key: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """Some rows laid end to end, as arrays on the host and in causal order; t = rows * seq_length."""

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
    samples: tuple[SampleId, ...]
    sample_starts: tuple[int, ...]
    """First token of each sample."""
    sample_lengths: tuple[int, ...]
    """Tokens of each sample: its attention segment."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(self.sample_lengths)

    @property
    def sample_tokens(self) -> np.ndarray:
        """[t] bool: tokens that are not padding."""
        tokens = np.zeros(self.input_ids.size, dtype=bool)
        for start, length in zip(self.sample_starts, self.sample_lengths, strict=True):
            tokens[start : start + length] = True
        return tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch(PackedRows):
    """What one forward pass of one rank needs: rows, and all that the rank does with them, planned once.

    What is planned depends on no label and no loss weight: those may be replaced.
    """

    pixel_values: torch.Tensor | None = None
    """[p, 3 * patch * patch] uint8, or floats that are normalised already: patches in 2x2-merge-block order, of the
    scale images that this rank encodes, in order of appearance. None behind the first stage."""
    vision_plan: VisionPlan
    """This rank's share of the encoding; ``feature_index`` is of the image tokens that it holds."""
    modality_order: ModalityOrder
    """Where this rank holds which token."""
    image_rows: np.ndarray
    """[m] int64: tokens of this rank that visual features replace, in order of appearance."""
    loss_groups: np.ndarray
    """[t] int64: the group in which each token's loss is reported, see ``data.loss_groups``."""
    num_visual_tokens: int
    """Tokens of the visual experts, padding not counted."""
    num_shrunk: int = 0
    """Samples without their images' largest scales, so as to fit a row."""
    failures: tuple[FailedSample, ...] = ()
    """Samples that failed on this rank; other ranks of the replica may have seen others."""

    @property
    def workload(self) -> Workload:
        """The numbers that FLOPs follow from."""
        return Workload(
            text_tokens=self.num_tokens - self.num_visual_tokens,
            visual_tokens=self.num_visual_tokens,
            segment_lengths=self.sample_lengths,
            grids=grids_of(self.image_grid_thw),
            num_predictions=int(np.count_nonzero(self.labels != IGNORED_LABEL)),
        )

    @property
    def padded_workload(self) -> Workload:
        """The same with padding, which is computed and kept like anything else."""
        num_visual = int(np.count_nonzero(self.visual_token_mask))
        return replace(
            self.workload,
            text_tokens=self.input_ids.size - num_visual,
            visual_tokens=num_visual,
            segment_lengths=self.segment_lengths,
        )
