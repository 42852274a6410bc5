"""Model FLOPs of a step, with the encoder and the sum of squared segment lengths counted.

Padding does no useful work and is left out. A multiply-add is 2. The backward pass costs one forward pass for the
gradients of activations and one more for those of the weights that the phase trains.
"""

from collections.abc import Iterable, Iterator

from navil_megatron.config.schema import ModelConfig
from navil_megatron.data.types import Microbatch
from navil_megatron.models.freezing import is_trainable

Term = tuple[str, float]
"""Name of a parameter that stands for a group of matrices (empty: no weight), and its forward FLOPs."""


def step_flops(model: ModelConfig, phase: str, microbatches: Iterable[Microbatch]) -> float:
    """FLOPs of forward and backward over these microbatches."""
    total = 0.0
    for microbatch in microbatches:
        for parameter, forward in forward_flops(model, microbatch):
            # Attention has two operands and no weight: its backward pass costs twice its forward pass.
            backward = 2 if not parameter or is_trainable(parameter, phase) else 1
            total += forward * (1 + backward)
    return total


def forward_flops(model: ModelConfig, microbatch: Microbatch) -> Iterator[Term]:
    """Forward FLOPs of one microbatch, matrix group by matrix group."""
    yield from _encoder(model, microbatch)
    yield from _decoder(model, microbatch)


def _encoder(model: ModelConfig, microbatch: Microbatch) -> Iterator[Term]:
    vision, hidden = model.vision, model.language.hidden_size
    w, f = vision.hidden_size, vision.ffn_hidden_size
    grids = [(int(t), int(h) * int(w_)) for t, h, w_ in microbatch.image_grid_thw]
    patches = sum(frames * segment for frames, segment in grids)
    pairs = sum(frames * segment**2 for frames, segment in grids)
    tokens = patches // vision.merge_size**2
    yield "vision_encoder.", 2.0 * patches * w * (vision.patch_dim + vision.num_layers * (4 * w + 2 * f))
    yield "", 4.0 * vision.num_layers * pairs * w
    yield "connector.", 2.0 * tokens * hidden * (vision.merged_size + hidden)


def _decoder(model: ModelConfig, microbatch: Microbatch) -> Iterator[Term]:
    language = model.language
    query = language.num_attention_heads * language.head_dim
    key_value = 2 * language.num_query_groups * language.head_dim
    attention = language.hidden_size * (2 * query + key_value)
    feed_forward = 3 * language.hidden_size * language.ffn_hidden_size
    for modality, tokens in zip(("text", "visual"), tokens_by_modality(model, microbatch), strict=True):
        per_layer = 2.0 * tokens * language.num_layers
        yield f"decoder.layers.0.self_attention.linear_qkv.{modality}.weight", per_layer * attention
        yield f"decoder.layers.0.mlp.linear_fc1.{modality}.weight", per_layer * feed_forward
    # Causal: half of each segment's square.
    pairs = sum(length**2 for length in microbatch.sample_lengths) / 2
    yield "", 4.0 * language.num_layers * pairs * query
    predicted = int((microbatch.labels != -100).sum())
    yield "output_layer.weight", 2.0 * predicted * language.hidden_size * language.vocab_size


def tokens_by_modality(model: ModelConfig, microbatch: Microbatch) -> tuple[int, int]:
    """(text, visual) tokens of a microbatch, padding not counted."""
    image_ids = (model.special_token_id("<IMG_CONTEXT>"), model.special_token_id("<img>"))
    visual = sum(int((microbatch.input_ids == token).sum()) for token in image_ids)
    return microbatch.num_tokens - visual, visual
