"""The tokens and images of one microbatch, as numbers: what FLOPs, activations and traffic follow from."""

from dataclasses import dataclass

from navil_megatron.blueprint.experts_placement import loads_of_ranks
from navil_megatron.blueprint.image_plan import Grid, ImagePlanner, count_image_tokens, num_patches
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.vision import VisionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One microbatch; padding is in none of these numbers."""

    text_tokens: int
    visual_tokens: int
    segment_lengths: tuple[int, ...]
    """Tokens of each attention segment."""
    grids: tuple[Grid, ...]
    """Frames, patch rows and patch columns of every scale-image."""
    num_predictions: int
    """Positions with a loss."""

    @property
    def num_tokens(self) -> int:
        """Text and visual tokens."""
        return self.text_tokens + self.visual_tokens

    @property
    def num_patches(self) -> int:
        """Patches of all scale-images."""
        return num_patches(self.grids)

    def image_tokens(self, vision: VisionConfig) -> int:
        """Tokens that leave the encoder."""
        return self.num_patches // vision.merge_size**2


def typical_workload(config: NaViLConfig, text_tokens: int, image_side: int) -> Workload:
    """A full microbatch of samples: a square image, its side in pixels before the limits of ``[data]``, and so many
    tokens of text, all of them predicted.
    """
    planner = ImagePlanner.from_config(config.data, config.model.vision)
    (scales,) = planner.plan_images([(image_side, image_side)])
    of_breaks, visual = count_image_tokens(scales, planner.merge_size)
    text = of_breaks + text_tokens
    length = min(text + visual, config.data.seq_length)
    num_samples = max(1, config.data.seq_length // length) * config.training.micro_batch_size
    left = config.microbatch_tokens - num_samples * length
    # What is left of a row is filled with text that carries no loss, as padding would.
    segments = (length,) * num_samples + ((left,) if left else ())
    grids = tuple(scale.grid for scale in scales) * num_samples
    return Workload(
        text_tokens=config.microbatch_tokens - num_samples * visual,
        visual_tokens=num_samples * visual,
        segment_lengths=segments,
        grids=grids,
        num_predictions=num_samples * text_tokens,
    )


def expert_loads(work: Workload, config: NaViLConfig) -> list[float]:
    """Rows of each expert-parallel rank over their mean, routers being even."""
    ranks, num_experts = config.parallel.expert_model_parallel_size, config.model.language.num_experts
    return loads_of_ranks(work.visual_tokens / max(work.num_tokens, 1), ranks, num_experts)
