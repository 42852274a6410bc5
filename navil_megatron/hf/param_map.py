"""The table: row of the table of parameters <-> Hugging Face keys, per family, with the name of the transform.

HF names are those of the authors' state dict (specification, section 5); those of the decoder layers are in
``families``. Shapes on the HF side follow from those of the checkpoint and the transform.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from navil_megatron.blueprint.parameters import Parameter, Shape, parameters
from navil_megatron.config.modality import MODALITIES
from navil_megatron.config.model import ModelConfig
from navil_megatron.hf.llm.families import HF_FAMILIES
from navil_megatron.hf.transforms import TRANSFORMS, Transform

_PATCHES = "vision_encoder.patch_embedding.weight"
_VISION = "vision_model.encoder.layers.{i}"
_MODULES = {
    "vision_encoder.patch_embedding": "vision_model.embeddings.patch_embedding",
    "vision_encoder.layers.norm1": f"{_VISION}.norm1",
    "vision_encoder.layers.norm2": f"{_VISION}.norm2",
    "vision_encoder.layers.linear_qkv": f"{_VISION}.attn.qkv",
    "vision_encoder.layers.linear_proj": f"{_VISION}.attn.proj",
    "vision_encoder.layers.layer_scale1": f"{_VISION}.ls1",
    "vision_encoder.layers.layer_scale2": f"{_VISION}.ls2",
    "vision_encoder.layers.linear_fc1": f"{_VISION}.mlp.fc1",
    "vision_encoder.layers.linear_fc2": f"{_VISION}.mlp.fc2",
    # mlp1 is a Sequential of LayerNorm, Linear, GELU, Linear.
    "connector.norm": "mlp1.0",
    "connector.linear_fc1": "mlp1.1",
    "connector.linear_fc2": "mlp1.3",
    "special_token_embedding": "special_token_embedding",
}
"""Modules outside the language model, ``{i}`` standing for the layer, in the order in which HF files hold them."""


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter of the checkpoint and where it lies in Hugging Face files."""

    parameter: Parameter
    """What the checkpoint holds."""
    hf_keys: tuple[str, ...]
    """Keys in the HF files; ``{i}`` stands for the layer."""
    transform: str
    """Name in ``transforms.TRANSFORMS``."""

    @property
    def function(self) -> Transform:
        """The transform itself."""
        return TRANSFORMS[self.transform]

    def hf_keys_of_layers(self) -> Iterator[tuple[str, ...]]:
        """The HF keys of every layer, first to last; once if the parameter exists once."""
        for layer in range(self.parameter.num_layers or 1):
            yield tuple(key.format(i=layer) for key in self.hf_keys)

    def hf_shapes(self, model: ModelConfig) -> tuple[Shape, ...]:
        """The shape under each HF key, the same in every layer."""
        parts = self.function.to_hf(torch.empty(self.parameter.shape, device="meta"), model)
        return tuple(tuple(part.shape) for part in parts)


def table(model: ModelConfig) -> tuple[Row, ...]:
    """Every parameter that a model of this config has, once, in the order in which HF files hold them."""
    family = HF_FAMILIES[model.language.family]
    modules = _MODULES | {
        "embedding.word_embeddings": f"language_model.{family.embedding}",
        "decoder.final_layernorm": f"language_model.{family.final_norm}",
        "output_layer": f"language_model.{family.head}",
    }
    order, of_layer = list(modules), family.names(model.language.num_experts)

    def place_and_row(parameter: Parameter) -> tuple[int, Row]:
        module, _, kind = parameter.key.rpartition(".")
        if not module.startswith("decoder.layers."):
            module, kind = (module, f".{kind}") if module in modules else (parameter.key, "")  # LayerScale has no kind
            transform = "patch_convolution" if parameter.key == _PATCHES else "same"
            return order.index(module), Row(parameter, (f"{modules[module]}{kind}",), transform)
        # The norms of both modalities, then the text expert, then the visual one beside it.
        modality, suffix = parameter.modality, "_ve" if parameter.modality == "visual" else ""
        names = of_layer[parameter.key.removeprefix("decoder.layers.").replace(f".{modality}", "")]
        keys = tuple(f"language_model.model.layers.{{i}}.{key.format(ve=suffix)}" for key in names.keys)
        return len(order) + (None, *MODALITIES).index(modality), Row(parameter, keys, names.transform)

    placed = sorted(map(place_and_row, parameters(model)), key=lambda found: found[0])
    return tuple(row for _, row in placed)


def hf_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Every key that the model's HF files hold, with its shape."""
    return {
        key: shape
        for row in table(model)
        for keys in row.hf_keys_of_layers()
        for key, shape in zip(keys, row.hf_shapes(model), strict=True)
    }
