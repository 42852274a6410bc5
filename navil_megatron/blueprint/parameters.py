"""The table of a model's parameters: the one place that knows their names, shapes, splits, parts and first values.

Checkpoints, conversion, planning, freezing, initial values and reports read it; a test holds it against the built
model, entry by entry.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any, Literal

from navil_megatron.config.language import LanguageConfig
from navil_megatron.config.modality import MODALITIES, Modality
from navil_megatron.config.model import SPECIAL_TOKENS, ModelConfig
from navil_megatron.config.vision import VisionConfig

type Shape = tuple[int, ...]

Part = Literal[
    "vision_encoder",
    "connector",
    "embedding",
    "special_token_embedding",
    "text attention",
    "text feed-forward",
    "visual attention",
    "visual feed-forward",
    "norms",
    "output_layer",
]
"""What reports count parameters by; ``norms`` are those of the decoder that both modalities share."""

_FROZEN_BEFORE_S2: tuple[Part, ...] = ("norms", "text feed-forward", "embedding", "output_layer")
_FROZEN: Mapping[str, tuple[Part, ...]] = {
    "s1.1": (*_FROZEN_BEFORE_S2, "text attention"),
    "s1.2": _FROZEN_BEFORE_S2,
    "s2": (),
}
"""What each phase of the recipe leaves as it is (paper, tables 7 and 8)."""

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
"""Keys of the two tables of the vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of the whole model, of all its layers together."""

    key: str
    """Its key in a checkpoint: the name in the built model, without the number of the layer."""
    shape: Shape
    """Whole shape, of one layer; several experts of a modality lie on axis 0."""
    part: Part
    """What it counts to."""
    num_layers: int | None = None
    """Layers, which a checkpoint holds on an axis of their own in front; ``None``: it exists once."""
    split_dim: int | None = None
    """Dimension of which each tensor-parallel rank holds a piece; ``None``: every one of them holds it whole."""
    split_blocks: int = 1
    """Blocks of that dimension, each of which is split on its own (2 for [gate; up])."""
    is_vocabulary: bool = False
    """Its rows are words: what a rank holds of them is padded (``blueprint.vocabulary``)."""
    num_experts: int | None = None
    """Of a feed-forward expert: how many its modality has. Expert-parallel ranks share them out, and each is split over
    expert-tensor-parallel ranks."""
    used_on: Literal["tokens", "heads", "images"] | None = None
    """What a tensor-parallel rank uses its whole copy on, other than the other ranks do, so that their gradients must
    be summed; tokens are divided under sequence parallelism alone. ``None``: it is split, or all use it alike."""
    is_shared: bool = False
    """The built model has the text parameter in its place; a checkpoint holds the values under both keys."""
    mean: float = 0.0
    """Of its first values where no weights are given."""
    std: float = 0.0
    """Standard deviation of them; 0: all are ``mean``."""

    @property
    def whole_shape(self) -> Shape:
        """Shape in a checkpoint."""
        return self.shape if self.num_layers is None else (self.num_layers, *self.shape)

    @property
    def numel(self) -> int:
        """Numbers in it, of all layers."""
        return prod(self.whole_shape)

    @property
    def modality(self) -> Modality | None:
        """The modality that it belongs to alone."""
        return next((modality for modality in MODALITIES if self.part.startswith(modality)), None)

    def name(self, layer: int) -> str:
        """Its name in a built model, in the layer with this number there."""
        return self.key.replace(".layers.", f".layers.{layer}.", 1)


@cache
def parameters(model: ModelConfig) -> tuple[Parameter, ...]:
    """Every parameter that a checkpoint of the model holds, in the order of the built model."""
    language = model.language
    h, std = language.hidden_size, language.init_std
    table: dict[str, Any] = {"shape": (language.vocab_size, h), "split_dim": 0, "is_vocabulary": True, "std": std}
    found = [
        *vision_parameters(model.vision),
        *_connector(model),
        Parameter(key=EMBEDDING, part="embedding", **table),
        Parameter(
            key="special_token_embedding.weight",
            shape=(len(SPECIAL_TOKENS), h),
            part="special_token_embedding",
            std=std,
        ),
        *_stacked("decoder.layers", language.num_layers, (*_attention(language), *_feed_forward(language))),
        *_module("decoder.final_layernorm", (h,), mean=1.0, part="norms", used_on="tokens"),
    ]
    if not language.tied_embeddings:
        found.append(Parameter(key=HEAD, part="output_layer", **table))
    return tuple(found)


def vision_parameters(vision: VisionConfig) -> Iterator[Parameter]:
    """Those of the visual encoder."""
    w, f, std = vision.hidden_size, vision.ffn_hidden_size, vision.init_std
    about: dict[str, Any] = {"part": "vision_encoder", "used_on": "images"}
    norm_bias = vision.norm == "layernorm"
    yield from _module("vision_encoder.patch_embedding", (w, vision.patch_dim), std=std, bias=True, **about)
    layer = (
        *(Parameter(key=f"layer_scale{n}", shape=(w,), mean=vision.layer_scale_init, **about) for n in (1, 2)),
        *_module("norm1", (w,), mean=1.0, bias=norm_bias, **about),
        *_module("linear_qkv", (3 * w, w), std=std, bias=vision.qkv_bias, **about),
        *_module("linear_proj", (w, w), std=std, bias=True, **about),
        *_module("norm2", (w,), mean=1.0, bias=norm_bias, **about),
        *_module("linear_fc1", (f, w), std=std, bias=True, **about),
        *_module("linear_fc2", (w, f), std=std, bias=True, **about),
    )
    yield from _stacked("vision_encoder.layers", vision.num_layers, layer)


@cache
def parameters_by_key(model: ModelConfig) -> dict[str, Parameter]:
    """The same, by their keys."""
    return {parameter.key: parameter for parameter in parameters(model)}


def parameter_of(model: ModelConfig, name: str) -> Parameter:
    """The entry of a parameter of the built model; a stage's copy of a tied embedding table is the table."""
    key = re.sub(r"\.layers\.\d+\.", ".layers.", name, count=1)
    return parameters_by_key(model)[EMBEDDING if key == HEAD and model.language.tied_embeddings else key]


def checkpoint_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Every key that a checkpoint holds of the model, with the shape of the whole tensor."""
    return {parameter.key: parameter.whole_shape for parameter in parameters(model)}


def initial_seed(seed: int, name: str) -> int:
    """Seed of the generator that a tensor of its own name starts from, whatever is drawn before it; below 2^63."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def is_trainable(part: Part, phase: str) -> bool:
    """Whether a phase of the recipe trains this part of the model."""
    return part not in _FROZEN[phase]


def count_by_part(model: ModelConfig, phase: str = "s2") -> dict[Part, int]:
    """Parameters of each part that the phase trains."""
    counts: dict[Part, int] = {}
    for entry in (entry for entry in parameters(model) if not entry.is_shared):
        counts[entry.part] = counts.get(entry.part, 0) + entry.numel * is_trainable(entry.part, phase)
    return counts


def active_parameters(model: ModelConfig) -> int:
    """Parameters, but of each modality only as many experts as its router chooses for a token."""
    own = [parameter for parameter in parameters(model) if not parameter.is_shared]
    return sum(
        p.numel // (p.num_experts or 1) * (model.language.experts_per_token if p.num_experts else 1) for p in own
    )


def _module(key: str, shape: Shape, *, bias: bool = False, **about: Any) -> Iterator[Parameter]:
    """The weight of a module and its bias [out], which is split as the weight's rows are and starts with zeros."""
    yield Parameter(key=f"{key}.weight", shape=shape, **about)
    if bias:
        yield Parameter(key=f"{key}.bias", shape=shape[:1], **{**about, "mean": 0.0, "std": 0.0})


def _stacked(prefix: str, num_layers: int, layer: Iterable[Parameter]) -> Iterator[Parameter]:
    for parameter in layer if num_layers else ():
        yield replace(parameter, key=f"{prefix}.{parameter.key}", num_layers=num_layers)


def _connector(model: ModelConfig) -> Iterator[Parameter]:
    merged, h, std = model.vision.merged_size, model.language.hidden_size, model.vision.init_std
    about: dict[str, Any] = {"part": "connector", "used_on": "images"}
    yield from _module("connector.norm", (merged,), mean=1.0, bias=True, **about)
    yield from _module("connector.linear_fc1", (h, merged), std=std, bias=True, **about)
    yield from _module("connector.linear_fc2", (h, h), std=std, bias=True, **about)


def _of_modality(part: str, shared: bool) -> dict[Modality, dict[str, Any]]:
    """What tells the modalities' parameters in a part of a layer apart."""
    return {m: {"part": f"{m} {part}", "is_shared": shared and m != MODALITIES[0]} for m in MODALITIES}


def _attention(language: LanguageConfig) -> Iterator[Parameter]:
    """Of one decoder layer: the norm before it and both modalities' projections and head norms."""
    h, d, std = language.hidden_size, language.head_dim, language.init_std
    query, key_value = language.num_attention_heads * d, 2 * language.num_query_groups * d
    of_modality = _of_modality("attention", language.shares("attention"))
    yield from _module("input_layernorm", (h,), mean=1.0, part="norms", used_on="tokens")
    for modality, about in of_modality.items():
        name = f"self_attention.linear_qkv.{modality}"
        yield from _module(name, (query + key_value, h), std=std, bias=language.qkv_bias, split_dim=0, **about)
    for norm in ("q_layernorm", "k_layernorm") if language.qk_norm else ():
        for modality, about in of_modality.items():
            yield from _module(f"self_attention.{norm}.{modality}", (d,), mean=1.0, used_on="heads", **about)
    for modality, about in of_modality.items():
        # The released 2B applies the visual output projection to the sum over the ranks, so each holds it whole.
        composed = modality == "visual" and language.composed_visual_output_projection
        split: dict[str, Any] = {"used_on": "tokens"} if composed else {"split_dim": 1}
        yield from _module(f"self_attention.linear_proj.{modality}", (h, query), std=std, **split, **about)


def _feed_forward(language: LanguageConfig) -> Iterator[Parameter]:
    """Of one decoder layer: the norm before it, both modalities' routers, and all their experts."""
    h, f, std, num_experts = language.hidden_size, language.ffn_hidden_size, language.init_std, language.num_experts
    of_modality = _of_modality("feed-forward", language.shares("ffn"))
    yield from _module("pre_mlp_layernorm", (h,), mean=1.0, part="norms", used_on="tokens")
    stack = () if num_experts == 1 else (num_experts,)
    for modality, about in of_modality.items() if stack else ():
        yield from _module(f"mlp.router.{modality}", (num_experts, h), std=std, used_on="tokens", **about)
    for module, shape, dim, blocks in (("linear_fc1", (2 * f, h), 0, 2), ("linear_fc2", (h, f), 1, 1)):
        for modality, about in of_modality.items():
            yield from _module(
                f"mlp.{module}.{modality}",
                (*stack, *shape),
                std=std,
                split_dim=len(stack) + dim,
                split_blocks=blocks,
                num_experts=num_experts,
                **about,
            )
