"""Every parameter that a pipeline chunk of a rank holds, with its size, from the config alone."""

from collections.abc import Iterator
from math import prod

from navil_megatron.blueprint.experts_placement import local_experts
from navil_megatron.blueprint.phases import is_trainable
from navil_megatron.config.language import LanguageConfig
from navil_megatron.config.modality import MODALITIES, Modality, ModalityPart
from navil_megatron.config.model import SPECIAL_TOKENS, ModelConfig
from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.config.vision import VisionConfig

type Sized = tuple[str, int]
"""Name of a parameter as the built model has it, and how many numbers a rank holds of it."""


def layers_of_chunks(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...]:
    """Decoder layers of each pipeline chunk in the order of the model; chunk c lies on stage c modulo stages."""
    chunks = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    return parallel.pipeline_layers or (num_layers // chunks,) * chunks


def chunk_parameters(model: ModelConfig, parallel: ParallelConfig, chunk: int, ep_rank: int = 0) -> Iterator[Sized]:
    """The parameters of one chunk on a rank with this place in its expert-parallel group."""
    layers = layers_of_chunks(parallel, model.language.num_layers)
    language, tensor = model.language, parallel.tensor_model_parallel_size
    is_first, is_last = chunk == 0, chunk == len(layers) - 1
    table = language.vocab_size * language.hidden_size // tensor
    if is_first:
        yield from _vision_encoder(model.vision)
        yield from _connector(model)
        yield "embedding.word_embeddings.weight", table
        yield "special_token_embedding.weight", len(SPECIAL_TOKENS) * language.hidden_size
    feed_forward = list(_feed_forward(language, parallel, ep_rank))
    for number in range(layers[chunk]):
        for name, numbers in (*_decoder_layer(language, tensor), *feed_forward):
            yield f"decoder.layers.{number}.{name}", numbers
    if is_last:
        yield "decoder.final_layernorm.weight", language.hidden_size
        # Tied: a stage that also embeds uses that table; another one holds a copy.
        if not (is_first and language.tied_embeddings):
            yield "output_layer.weight", table


def whole_model(model: ModelConfig) -> dict[str, int]:
    """Every parameter once."""
    return dict(chunk_parameters(model, ParallelConfig(), 0))


def count_by_part(model: ModelConfig, phase: str = "s2") -> dict[str, int]:
    """Parameters of each part that the phase trains."""
    counts: dict[str, int] = {}
    for name, numbers in whole_model(model).items():
        part = part_of(name)
        counts[part] = counts.get(part, 0) + (numbers if is_trainable(name, phase) else 0)
    return counts


def active_parameters(model: ModelConfig) -> int:
    """Parameters, but of each modality only as many experts as its router chooses for a token."""
    language = model.language
    idle = len(MODALITIES) * (language.num_experts - language.experts_per_token)
    one = 3 * language.hidden_size * language.ffn_hidden_size
    return sum(whole_model(model).values()) - language.num_layers * idle * one


def is_routed(model: ModelConfig, parallel: ParallelConfig) -> bool:
    """Whether the feed-forward experts have ranks, or a router, of their own."""
    return model.language.num_experts > 1 or parallel.expert_model_parallel_size > 1


def is_expert(name: str) -> bool:
    """Whether the parameter is a feed-forward expert's."""
    return ".mlp.linear_fc" in name


def expert_replicas(parallel: ParallelConfig, dp_size: int) -> int:
    """Ranks of a pipeline stage that hold the same part of the same experts."""
    ranks = dp_size * parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return ranks // (parallel.expert_tensor_size * parallel.expert_model_parallel_size)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, as a report names it."""
    if not name.startswith("decoder."):
        return name.split(".")[0]
    for modality in MODALITIES:
        if f".{modality}." in name:
            return f"{modality} {'attention' if '.self_attention.' in name else 'feed-forward'}"
    return "norms"


def _vision_encoder(vision: VisionConfig) -> Iterator[Sized]:
    w, f = vision.hidden_size, vision.ffn_hidden_size
    yield "vision_encoder.patch_embedding.weight", w * vision.patch_dim
    yield "vision_encoder.patch_embedding.bias", w
    norms = ("weight", "bias") if vision.norm == "layernorm" else ("weight",)
    layer = {
        **{f"norm{number}.{kind}": w for number in (1, 2) for kind in norms},
        "linear_qkv.weight": 3 * w * w,
        **({"linear_qkv.bias": 3 * w} if vision.qkv_bias else {}),
        "linear_proj.weight": w * w,
        "linear_proj.bias": w,
        "layer_scale1": w,
        "layer_scale2": w,
        "linear_fc1.weight": f * w,
        "linear_fc1.bias": f,
        "linear_fc2.weight": w * f,
        "linear_fc2.bias": w,
    }
    for number in range(vision.num_layers):
        for name, numbers in layer.items():
            yield f"vision_encoder.layers.{number}.{name}", numbers


def _connector(model: ModelConfig) -> Iterator[Sized]:
    merged, h = model.vision.merged_size, model.language.hidden_size
    for name, shape in (("norm", (merged,)), ("linear_fc1", (h, merged)), ("linear_fc2", (h, h))):
        yield f"connector.{name}.weight", prod(shape)
        yield f"connector.{name}.bias", shape[0]


def _decoder_layer(language: LanguageConfig, tensor: int) -> Iterator[Sized]:
    """One layer but for its feed-forward network."""
    h, d = language.hidden_size, language.head_dim
    query, key_value = language.num_attention_heads * d, 2 * language.num_query_groups * d
    yield "input_layernorm.weight", h
    yield "pre_mlp_layernorm.weight", h
    for modality in _modalities_with_weights(language, "attention"):
        yield f"self_attention.linear_qkv.{modality}.weight", (query + key_value) * h // tensor
        if language.qkv_bias:
            yield f"self_attention.linear_qkv.{modality}.bias", (query + key_value) // tensor
        # The released 2B applies the visual output projection to the sum over the ranks, so each holds it whole.
        composed = modality == "visual" and language.composed_visual_output_projection
        yield f"self_attention.linear_proj.{modality}.weight", h * h if composed else h * query // tensor
        if language.qk_norm:
            yield f"self_attention.q_layernorm.{modality}.weight", d
            yield f"self_attention.k_layernorm.{modality}.weight", d


def _modalities_with_weights(language: LanguageConfig, part: ModalityPart) -> tuple[Modality, ...]:
    """Modalities with weights of their own in a part of a layer."""
    return MODALITIES[:1] if language.shares(part) else MODALITIES


def _feed_forward(language: LanguageConfig, parallel: ParallelConfig, ep_rank: int) -> Iterator[Sized]:
    """The experts of one layer that are on a rank with this place in its expert-parallel group, and all routers."""
    one = language.hidden_size * language.ffn_hidden_size // parallel.expert_tensor_size
    if language.num_experts > 1:
        for modality in MODALITIES:
            yield f"mlp.router.{modality}.weight", language.router_weights
    held = local_experts(ep_rank, parallel.expert_model_parallel_size, language.num_experts)
    own = _modalities_with_weights(language, "ffn")
    for modality, numbers in ((modality, numbers) for modality, numbers in held.items() if modality in own):
        yield f"mlp.linear_fc1.{modality}.weight", 2 * one * len(numbers)
        yield f"mlp.linear_fc2.{modality}.weight", one * len(numbers)
