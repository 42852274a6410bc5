"""What the model takes for one packed microbatch."""

from dataclasses import dataclass

from torch import Tensor

from navil_megatron.layers.modality import NaViLPackedSeqParams
from navil_megatron.layers.vision_layer import VisionSegments


@dataclass(frozen=True, slots=True)
class EncoderInputs:
    """The images that this rank encodes; p patches."""

    pixel_values: Tensor
    """[p, patch_dim] uint8, or floats that are normalised already."""
    patch_index: Tensor
    """[p] rows of ``pixel_values`` in encoder order."""
    rows: Tensor
    """[p] patch row inside its image and scale."""
    columns: Tensor
    """[p] patch column."""
    images: VisionSegments
    """What attends to one another in layers of full attention."""
    windows: VisionSegments
    """The same in the other layers."""


@dataclass(frozen=True, slots=True)
class FirstStageInputs:
    """What only the first stage takes: tokens and images. t packed tokens and m image tokens of this rank."""

    input_ids: Tensor
    """[t] in modality-major order."""
    image_positions: Tensor
    """[m] rows that visual features replace, in order of appearance."""
    encoder: EncoderInputs
    feature_index: Tensor
    """[m] place of each image token among the gathered features of all ranks."""
    gathered_tokens: int
    """Merged tokens that every rank contributes to the gather."""


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """One microbatch, rows in modality-major order. t packed tokens of this rank, k of them positions with a loss."""

    packed_seq_params: NaViLPackedSeqParams
    """The modality plan and the attention segments."""
    position_ids: Tensor
    """[t] position of each token in its own sample, of all context-parallel ranks in attention order."""
    loss_positions: Tensor
    """[k] rows whose next token is predicted."""
    labels: Tensor | None
    """[k] that next token; None asks for logits instead of losses."""
    loss_weights: Tensor
    """[k] float32 weight of each prediction."""
    loss_groups: Tensor
    """[k] int64 group in which each prediction's loss is reported; see ``data.loss_groups``."""
    first_stage: FirstStageInputs | None
    """None on the other stages."""
