"""Model FLOPs of a microbatch, with the encoder and the sum of squared segment lengths counted.

Padding does no useful work and is left out. A multiply-add is 2. The backward pass costs one forward pass for the
gradients of activations and one more for those of the weights that the phase trains.
"""

from collections.abc import Iterable, Iterator

from navil_megatron.blueprint.phases import is_trainable
from navil_megatron.blueprint.workload import Workload
from navil_megatron.config.language import LanguageConfig
from navil_megatron.config.modality import MODALITIES
from navil_megatron.config.model import ModelConfig

Term = tuple[str, float]
"""Name of a parameter that stands for a group of matrices (empty: no weight), and its forward FLOPs."""


def forward_terms(model: ModelConfig, work: Workload) -> Iterator[Term]:
    """Forward FLOPs of one microbatch, matrix group by matrix group."""
    yield from encoder_terms(model, work)
    for name, flops in layer_terms(model.language, work):
        yield name, flops * model.language.num_layers
    yield from head_terms(model.language, work)


def backward_flops(terms: Iterable[Term], phase: str) -> float:
    """FLOPs of the backward pass of these matrix groups."""
    # Attention has two operands and no weight: its backward pass costs twice its forward pass.
    return sum(flops * (2 if not name or is_trainable(name, phase) else 1) for name, flops in terms)


def training_flops(model: ModelConfig, work: Workload, phase: str) -> float:
    """FLOPs of forward and backward of one microbatch."""
    terms = list(forward_terms(model, work))
    return sum(flops for _, flops in terms) + backward_flops(terms, phase)


def encoder_terms(model: ModelConfig, work: Workload) -> Iterator[Term]:
    """Encoder and connector."""
    vision, hidden = model.vision, model.language.hidden_size
    w, f = vision.hidden_size, vision.ffn_hidden_size
    pairs = sum(frames * (rows * columns) ** 2 for frames, rows, columns in work.grids)
    tokens = work.image_tokens(vision)
    yield "vision_encoder.", 2.0 * work.num_patches * w * (vision.patch_dim + vision.num_layers * (4 * w + 2 * f))
    yield "", 4.0 * vision.num_layers * pairs * w
    yield "connector.", 2.0 * tokens * hidden * (vision.merged_size + hidden)


def layer_terms(language: LanguageConfig, work: Workload) -> Iterator[Term]:
    """One decoder layer."""
    query = language.num_attention_heads * language.head_dim
    key_value = 2 * language.num_query_groups * language.head_dim
    attention = language.hidden_size * (2 * query + key_value)
    feed_forward = language.feed_forward_weights_per_token
    for modality, tokens in zip(MODALITIES, (work.text_tokens, work.visual_tokens), strict=True):
        yield f"decoder.layers.0.self_attention.linear_qkv.{modality}.weight", 2.0 * tokens * attention
        yield f"decoder.layers.0.mlp.linear_fc1.{modality}.weight", 2.0 * tokens * feed_forward
    # Causal: half of each segment's square.
    yield "", 4.0 * query * sum(length**2 for length in work.segment_lengths) / 2


def head_terms(language: LanguageConfig, work: Workload) -> Iterator[Term]:
    """The LM head, which runs on predicted positions alone."""
    yield "output_layer.weight", 2.0 * work.num_predictions * language.hidden_size * language.vocab_size
