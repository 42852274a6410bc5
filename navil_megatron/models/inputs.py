"""What the model takes for one packed microbatch, on its device."""

from dataclasses import dataclass

from torch import Tensor

from navil_megatron.blueprint.vision_plan import VisionPlan
from navil_megatron.layers.modality import NaViLPackedSeqParams


@dataclass(frozen=True, slots=True)
class FirstStageInputs:
    """What only the first stage takes: tokens and pixels.

    t packed tokens and m image tokens of this context-parallel rank, p patches that it encodes.
    """

    input_ids: Tensor
    """[t] in modality-major order."""
    image_positions: Tensor
    """[m] rows that visual features replace, in order of appearance."""
    pixel_values: Tensor
    """[p, patch_dim]."""
    vision_plan: VisionPlan
    """This rank's share of the encoding."""


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """One microbatch, rows in modality-major order. t packed tokens of this rank, k of them positions with a loss."""

    packed_seq_params: NaViLPackedSeqParams
    """The modality plan and the attention segments."""
    position_ids: Tensor
    """[t] position of each token in its own sample."""
    loss_positions: Tensor
    """[k] rows whose next token is predicted."""
    labels: Tensor | None
    """[k] that next token; None asks for logits instead of losses."""
    loss_weights: Tensor
    """[k] float32 weight of each prediction."""
    loss_groups: Tensor
    """[k] int64 group in which each prediction's loss is reported; see ``training.loss_groups``."""
    first_stage: FirstStageInputs | None
    """None on the other stages."""
