"""Model FLOPs of the microbatches of a step; ``blueprint.flops`` holds the formulas."""

from collections.abc import Iterable, Iterator

from navil_megatron.blueprint.flops import Term, backward_flops, forward_terms
from navil_megatron.blueprint.image_plan import grids_of, visual_tokens
from navil_megatron.blueprint.workload import Workload
from navil_megatron.config.model import ModelConfig
from navil_megatron.data.types import Microbatch


def step_flops(model: ModelConfig, phase: str, microbatches: Iterable[Microbatch]) -> float:
    """FLOPs of forward and backward over these microbatches."""
    total = 0.0
    for microbatch in microbatches:
        terms = list(forward_flops(model, microbatch))
        total += sum(flops for _, flops in terms) + backward_flops(terms, phase)
    return total


def forward_flops(model: ModelConfig, microbatch: Microbatch) -> Iterator[Term]:
    """Forward FLOPs of one microbatch, matrix group by matrix group."""
    return forward_terms(model, workload_of(model, microbatch))


def workload_of(model: ModelConfig, microbatch: Microbatch) -> Workload:
    """A microbatch as the numbers that FLOPs follow from, padding not counted."""
    text, visual = tokens_by_modality(model, microbatch)
    return Workload(
        text_tokens=text,
        visual_tokens=visual,
        segment_lengths=microbatch.sample_lengths,
        grids=tuple(grids_of(microbatch.image_grid_thw)),
        num_predictions=int((microbatch.labels != -100).sum()),
    )


def tokens_by_modality(model: ModelConfig, microbatch: Microbatch) -> tuple[int, int]:
    """(text, visual) tokens of a microbatch, padding not counted."""
    visual = int(visual_tokens(microbatch.input_ids, model.special_token_ids).sum())
    return microbatch.num_tokens - visual, visual
