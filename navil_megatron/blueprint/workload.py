"""The tokens and images of one microbatch, as numbers: what FLOPs, activations and traffic follow from."""

from dataclasses import dataclass

from navil_megatron.blueprint.experts_placement import loads_of_ranks
from navil_megatron.blueprint.image_plan import Grid, ImagePlanner, ScalePlan, count_image_tokens, num_patches
from navil_megatron.config.errors import UserError
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


def typical_sample(config: NaViLConfig, text_tokens: int, image_side: int) -> tuple[tuple[ScalePlan, ...], int]:
    """The scales of a square image, its side in pixels before the limits of ``[data]``, and tokens of text, of a sample
    that fits a row: the image does without its largest scales where it must, as in training, then is a smaller one,
    and the text is cut last.

    Raises:
        UserError: The smallest image is too long for a row.
    """
    planner, row = ImagePlanner.from_config(config.data, config.model.vision), config.data.seq_length
    side, shortest = image_side, row + 1
    while side >= 1:
        (every,) = planner.plan_images([(side, side)])
        for dropped in range(len(every)):
            (scales,) = planner.plan_images([(side, side)], dropped)
            of_breaks, visual = count_image_tokens(scales, planner.merge_size)
            length = of_breaks + -(-visual // config.pad_segments_to) * config.pad_segments_to
            if length + text_tokens <= row:
                return scales, text_tokens
            smallest, shortest = scales, min(shortest, length)
        side = side * 9 // 10
    if shortest >= row:
        raise UserError(
            f"the smallest image takes more than the {row} tokens of a row; lower data.min_image_pixels or raise "
            "data.seq_length"
        )
    return smallest, row - shortest


def typical_workload(config: NaViLConfig, text_tokens: int, image_side: int) -> Workload:
    """A full microbatch of samples as of ``typical_sample``, whose tokens of text are all predicted."""
    planner = ImagePlanner.from_config(config.data, config.model.vision)
    scales, text_tokens = typical_sample(config, text_tokens, image_side)
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
