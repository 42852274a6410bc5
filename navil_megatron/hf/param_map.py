"""The table: checkpoint key <-> Hugging Face keys, per language-model family, with the name of the transform.

HF names are those of the authors' state dict (specification, section 5); those of the decoder layers are in
``families``. Shapes on the checkpoint side follow from the config; those on the HF side follow from the transform, so
no size is written twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from navil_megatron.config.language import LanguageConfig
from navil_megatron.config.modality import MODALITIES, Modality
from navil_megatron.config.model import SPECIAL_TOKENS, ModelConfig
from navil_megatron.config.vision import VisionConfig
from navil_megatron.hf.llm.families import HF_FAMILIES
from navil_megatron.hf.transforms import TRANSFORMS, Transform

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter of the checkpoint and where it lies in Hugging Face files."""

    mcore_key: str
    """Key of the whole tensor in the sharded checkpoint."""
    hf_keys: tuple[str, ...]
    """Keys in the HF files; ``{i}`` stands for the layer."""
    shape: Shape
    """Shape in the checkpoint, without the layer axis."""
    num_layers: int | None = None
    """Layers stacked on axis 0; ``None``: the parameter exists once."""
    transform: str = "same"
    """Name in ``transforms.TRANSFORMS``."""

    @property
    def function(self) -> Transform:
        """The transform itself."""
        return TRANSFORMS[self.transform]

    @property
    def mcore_shape(self) -> Shape:
        """Shape of the whole tensor in the checkpoint."""
        return self.shape if self.num_layers is None else (self.num_layers, *self.shape)

    def hf_keys_of_layers(self) -> Iterator[tuple[str, ...]]:
        """The HF keys of every layer, first to last; once if the parameter exists once."""
        for layer in range(1 if self.num_layers is None else self.num_layers):
            yield tuple(key.format(i=layer) for key in self.hf_keys)

    def hf_shapes(self, model: ModelConfig) -> tuple[Shape, ...]:
        """The shape under each HF key, the same in every layer."""
        parts = self.function.to_hf(torch.empty(self.shape, device="meta"), model)
        return tuple(tuple(part.shape) for part in parts)


def table(model: ModelConfig) -> tuple[Row, ...]:
    """Every parameter that a model of this config has, once."""
    rows = (
        *_vision_encoder(model.vision),
        *_connector(model),
        *_language_ends(model.language),
        *_decoder_layers(model.language),
    )
    return tuple(row for row in rows if row.num_layers != 0)


def hf_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Every key that the model's HF files hold, with its shape."""
    return {
        key: shape
        for row in table(model)
        for keys in row.hf_keys_of_layers()
        for key, shape in zip(keys, row.hf_shapes(model), strict=True)
    }


def mcore_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Every model key that the checkpoint holds, with the shape of the whole tensor."""
    return {row.mcore_key: row.mcore_shape for row in table(model)}


def _vision_encoder(vision: VisionConfig) -> Iterator[Row]:
    w, f = vision.hidden_size, vision.ffn_hidden_size
    ours, theirs = "vision_encoder.layers", "vision_model.encoder.layers.{i}"

    def layer(name: str, hf_name: str, *shape: int) -> Row:
        return Row(f"{ours}.{name}", (f"{theirs}.{hf_name}",), shape, vision.num_layers)

    patch = "vision_model.embeddings.patch_embedding"
    yield Row(
        "vision_encoder.patch_embedding.weight", (f"{patch}.weight",), (w, vision.patch_dim), None, "patch_convolution"
    )
    yield Row("vision_encoder.patch_embedding.bias", (f"{patch}.bias",), (w,))
    for norm in ("norm1", "norm2"):
        yield layer(f"{norm}.weight", f"{norm}.weight", w)
        if vision.norm == "layernorm":
            yield layer(f"{norm}.bias", f"{norm}.bias", w)
    yield layer("linear_qkv.weight", "attn.qkv.weight", 3 * w, w)
    if vision.qkv_bias:
        yield layer("linear_qkv.bias", "attn.qkv.bias", 3 * w)
    yield layer("linear_proj.weight", "attn.proj.weight", w, w)
    yield layer("linear_proj.bias", "attn.proj.bias", w)
    yield layer("layer_scale1", "ls1", w)
    yield layer("layer_scale2", "ls2", w)
    yield layer("linear_fc1.weight", "mlp.fc1.weight", f, w)
    yield layer("linear_fc1.bias", "mlp.fc1.bias", f)
    yield layer("linear_fc2.weight", "mlp.fc2.weight", w, f)
    yield layer("linear_fc2.bias", "mlp.fc2.bias", w)


def _connector(model: ModelConfig) -> Iterator[Row]:
    merged, h = model.vision.merged_size, model.language.hidden_size
    # mlp1 is a Sequential of LayerNorm, Linear, GELU, Linear.
    for ours, theirs, weight in (("norm", 0, (merged,)), ("linear_fc1", 1, (h, merged)), ("linear_fc2", 3, (h, h))):
        yield Row(f"connector.{ours}.weight", (f"mlp1.{theirs}.weight",), weight)
        yield Row(f"connector.{ours}.bias", (f"mlp1.{theirs}.bias",), weight[:1])
    yield Row("special_token_embedding.weight", ("special_token_embedding.weight",), (len(SPECIAL_TOKENS), h))


def _language_ends(language: LanguageConfig) -> Iterator[Row]:
    v, h = language.vocab_size, language.hidden_size
    family = HF_FAMILIES[language.family]
    yield Row("embedding.word_embeddings.weight", (f"language_model.{family.embedding}.weight",), (v, h))
    yield Row("decoder.final_layernorm.weight", (f"language_model.{family.final_norm}.weight",), (h,))
    if not language.tied_embeddings:
        yield Row("output_layer.weight", (f"language_model.{family.head}.weight",), (v, h))


def _decoder_layers(language: LanguageConfig) -> Iterator[Row]:
    """The norms once, for both modalities; the experts once per modality, under the family's names."""
    names = HF_FAMILIES[language.family].names(language.num_experts)

    def row(parameter: str, shape: Shape, modality: str = "", suffix: str = "") -> Row:
        module, _, kind = parameter.rpartition(".")
        ours = ".".join(part for part in ("decoder.layers", module, modality, kind) if part)
        theirs = (f"language_model.model.layers.{{i}}.{key.format(ve=suffix)}" for key in names[parameter].keys)
        return Row(ours, tuple(theirs), shape, language.num_layers, names[parameter].transform)

    for norm in ("input_layernorm.weight", "pre_mlp_layernorm.weight"):
        yield row(norm, (language.hidden_size,))
    for modality, suffix in zip(MODALITIES, ("", "_ve"), strict=True):
        for parameter, shape in _expert_shapes(language, modality).items():
            yield row(parameter, shape, modality, suffix)


def _expert_shapes(language: LanguageConfig, modality: Modality) -> dict[str, Shape]:
    """What one layer holds for one modality."""
    h, f, d = language.hidden_size, language.ffn_hidden_size, language.head_dim
    query, key_value = language.num_attention_heads * d, 2 * language.num_query_groups * d
    composed = modality == "visual" and language.composed_visual_output_projection
    biases = {"self_attention.linear_qkv.bias": (query + key_value,)} if language.qkv_bias else {}
    head_norms = {f"self_attention.{part}_layernorm.weight": (d,) for part in "qk"} if language.qk_norm else {}
    experts = () if language.num_experts == 1 else (language.num_experts,)
    router = {"mlp.router.weight": (*experts, h)} if experts else {}
    return {
        "self_attention.linear_qkv.weight": (query + key_value, h),
        **biases,
        "self_attention.linear_proj.weight": (h, h if composed else query),
        **head_norms,
        **router,
        "mlp.linear_fc1.weight": (*experts, 2 * f, h),
        "mlp.linear_fc2.weight": (*experts, h, f),
    }
