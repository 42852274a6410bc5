"""FLOPs of encoder and decoder, by arithmetic: a product with a matrix takes two for each weight and token.

Everything is an integer, so that every machine deals rows and images alike. Padding does no useful work and is left
out. The backward pass costs one forward pass for the gradients of activations and one more for those of the weights
that the phase trains.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache

import numpy as np

from navil_megatron.blueprint.image_plan import Grid
from navil_megatron.blueprint.parameters import Part, is_trainable, parameters, vision_parameters
from navil_megatron.blueprint.workload import Workload
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.vision import VisionConfig

Term = tuple[Part | None, int]
"""The part of the model that a group of products belongs to (``None``: those of a softmax, which has no weight), and
their forward FLOPs."""


def forward_terms(model: ModelConfig, work: Workload) -> Iterator[Term]:
    """Forward FLOPs of one microbatch."""
    yield from encoder_terms(model, work)
    for part, flops in layer_terms(model, work):
        yield part, flops * model.language.num_layers
    yield from head_terms(model, work)


def forward_flops(terms: Iterable[Term]) -> int:
    """FLOPs of these products."""
    return sum(flops for _, flops in terms)


def backward_flops(terms: Iterable[Term], phase: str) -> int:
    """FLOPs of their backward pass."""
    # A softmax's products have two operands and no weight: their backward pass costs twice the forward pass.
    return sum(flops * (2 if part is None or is_trainable(part, phase) else 1) for part, flops in terms)


def training_flops(model: ModelConfig, work: Workload, phase: str) -> float:
    """FLOPs of forward and backward of one microbatch."""
    terms = list(forward_terms(model, work))
    return forward_flops(terms) + backward_flops(terms, phase)


def encoder_terms(model: ModelConfig, work: Workload) -> Iterator[Term]:
    """Encoder and connector."""
    flops, vision = flops_per_token(model), model.vision
    yield "vision_encoder", flops["vision_encoder"] * work.num_patches
    pairs = sum(frames * attending_pairs(rows, columns, vision) for frames, rows, columns in work.grids)
    yield None, flops_per_patch_pair(vision) * pairs
    yield "connector", flops["connector"] * work.image_tokens(vision)


def layer_terms(model: ModelConfig, work: Workload) -> Iterator[Term]:
    """One decoder layer."""
    flops, language = flops_per_token(model), model.language
    parts: tuple[tuple[Part, int], ...] = (
        ("text attention", work.text_tokens),
        ("text feed-forward", work.text_tokens),
        ("visual attention", work.visual_tokens),
        ("visual feed-forward", work.visual_tokens),
    )
    for part, tokens in parts:
        yield part, flops[part] // language.num_layers * tokens
    if language.composed_visual_output_projection:
        yield "text attention", _text_projection_flops(model) // language.num_layers * work.visual_tokens
    pairs = sum(length**2 for length in work.segment_lengths)
    yield None, _flops_per_token_pair(model) // language.num_layers * pairs


def head_terms(model: ModelConfig, work: Workload) -> Iterator[Term]:
    """The LM head, which runs on predicted positions alone."""
    yield "output_layer", flops_per_token(model)["output_layer"] * work.num_predictions


def sample_flops(
    model: ModelConfig, num_text: np.ndarray, num_visual: np.ndarray, patches: np.ndarray, pairs: np.ndarray
) -> np.ndarray:
    """[n] int64: forward FLOPs of samples, each one segment of whose text tokens all are predicted; by this measure
    rows are dealt to ranks. All arguments [n] int64; ``pairs`` are those of ``attending_pairs``.
    """
    flops, vision = flops_per_token(model), model.vision
    text = flops["text attention"] + flops["text feed-forward"] + flops["output_layer"]
    visual = flops["visual attention"] + flops["visual feed-forward"]
    if model.language.composed_visual_output_projection:
        visual += _text_projection_flops(model)
    decoder = text * num_text + visual * num_visual + _flops_per_token_pair(model) * (num_text + num_visual) ** 2
    encoder = flops["vision_encoder"] * patches + flops_per_patch_pair(vision) * pairs
    return decoder + encoder + flops["connector"] * (patches // vision.merge_size**2)


def encoding_cost(grid: Grid, vision: VisionConfig) -> int:
    """FLOPs of the encoder's layers on one scale-image, by which images are dealt to ranks."""
    if not vision.num_layers:  # images are still dealt, as to one layer
        vision = replace(vision, num_layers=1)
    frames, rows, columns = grid
    pairs = attending_pairs(rows, columns, vision)
    return frames * (_flops_of_layers(vision) * rows * columns + flops_per_patch_pair(vision) * pairs)


@cache
def flops_per_token(model: ModelConfig) -> dict[Part, int]:
    """Forward FLOPs of one token (a patch, a merged token, a prediction) through the matrices of each part.

    A token meets the experts that its router chooses.
    """
    language = model.language
    flops: dict[Part, int] = {"output_layer": 2 * language.vocab_size * language.hidden_size}
    for entry in parameters(model):
        if len(entry.shape) > 1 and entry.part not in ("embedding", "special_token_embedding", "output_layer"):
            met = entry.numel // entry.num_experts * language.experts_per_token if entry.num_experts else entry.numel
            flops[entry.part] = flops.get(entry.part, 0) + 2 * met
    return flops


def attending_pairs[Sizes: (int, np.ndarray)](rows: Sizes, columns: Sizes, vision: VisionConfig) -> Sizes:
    """Pairs of patches of one frame (of each of several) that attend to each other, summed over the encoder's layers;
    rows and columns of patches are whole merge blocks.
    """
    whole = (rows * columns) ** 2
    if vision.full_attention_layers is None:
        return vision.num_layers * whole
    # Windows are cut from the top left; those at the right and at the bottom are what is left.
    side, num_full = vision.window_size, len(set(vision.full_attention_layers))
    down, across = (length // side * side**2 + (length % side) ** 2 for length in (rows, columns))
    return num_full * whole + (vision.num_layers - num_full) * down * across


@cache
def _flops_of_layers(vision: VisionConfig) -> int:
    """Forward FLOPs of one patch through the matrices of the encoder's layers."""
    return sum(2 * entry.numel for entry in vision_parameters(vision) if entry.num_layers and len(entry.shape) > 1)


def flops_per_patch_pair(vision: VisionConfig) -> int:
    """Scores and their products with the values, in one layer."""
    return 4 * vision.hidden_size


def _flops_per_token_pair(model: ModelConfig) -> int:
    """The same of two tokens of a segment, in all decoder layers; causal, so half of the pairs attend."""
    language = model.language
    return 2 * language.num_layers * language.num_attention_heads * language.head_dim


def _text_projection_flops(model: ModelConfig) -> int:
    """Of one token through the text experts' output projections, which visual tokens too pass where it is composed."""
    language = model.language
    return 2 * language.num_layers * language.hidden_size * language.num_attention_heads * language.head_dim
