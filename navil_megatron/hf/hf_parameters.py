"""Where the table of parameters lies in Hugging Face files: the keys of each family, and the transforms.

The keys are those of the authors' state dict; those inside a decoder layer are in
``llm/families.py``. Shapes follow from those of the checkpoint and the transform.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from navil_megatron.blueprint.parameters import Parameter, Shape, parameters
from navil_megatron.config.modality import MODALITIES
from navil_megatron.config.model import ModelConfig
from navil_megatron.hf.llm.families import HF_FAMILIES
from navil_megatron.hf.transforms import PATCH_CONVOLUTION, SAME, Transform

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
class Slot:
    """The place of one tensor, in a checkpoint or in Hugging Face files."""

    key: str
    shape: Shape
    """Shape of this tensor; for one layer of a stacked parameter without the layer axis."""
    layer: int | None = None
    """Index on axis 0 of the stacked parameter ``key`` of a checkpoint; ``None``: the whole tensor."""
    num_layers: int | None = None
    """Layers that the stacked parameter holds."""

    @property
    def name(self) -> str:
        """What messages and checksums call it: ``key`` or ``key[layer]``."""
        return self.key if self.layer is None else f"{self.key}[{self.layer}]"

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the tensor in a type."""
        return math.prod(self.shape) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class HFParameter:
    """One parameter of the checkpoint and where it lies in Hugging Face files."""

    parameter: Parameter
    keys: tuple[str, ...]
    """Keys in the HF files; ``{i}`` stands for the layer."""
    transform: Transform

    def slots(self, model: ModelConfig) -> Iterator[tuple[Slot, tuple[Slot, ...]]]:
        """The slot in the checkpoint and those in the HF files, of every layer; once if the parameter exists once."""
        key, shape, num_layers = self.parameter.key, self.parameter.shape, self.parameter.num_layers
        tensors = self.transform.to_hf((torch.empty(shape, device="meta"),), model)
        named = [(name, tuple(tensor.shape)) for name, tensor in zip(self.keys, tensors, strict=True)]
        for layer in range(num_layers or 1):
            ours = Slot(key, shape, None if num_layers is None else layer, num_layers)
            yield ours, tuple(Slot(name.format(i=layer), size) for name, size in named)


def hf_parameters(model: ModelConfig) -> tuple[HFParameter, ...]:
    """Every parameter that a model of this config has, once, in the order in which HF files hold them."""
    family = HF_FAMILIES[model.language.family]
    modules = _MODULES | {
        "embedding.word_embeddings": f"language_model.{family.embedding}",
        "decoder.final_layernorm": "language_model.model.norm",
        "output_layer": f"language_model.{family.head}",
    }
    order, of_layer = list(modules), family.names(model.language.num_experts)

    def placed(parameter: Parameter) -> tuple[int, HFParameter]:
        module, _, kind = parameter.key.rpartition(".")
        if not module.startswith("decoder.layers."):
            module, kind = (module, f".{kind}") if module in modules else (parameter.key, "")  # LayerScale has no kind
            transform = PATCH_CONVOLUTION if parameter.key == _PATCHES else SAME
            return order.index(module), HFParameter(parameter, (f"{modules[module]}{kind}",), transform)
        # The norms of both modalities, then the text expert, then the visual one beside it.
        modality, suffix = parameter.modality, "_ve" if parameter.modality == "visual" else ""
        names = of_layer[parameter.key.removeprefix("decoder.layers.").replace(f".{modality}", "")]
        keys = tuple(f"language_model.model.layers.{{i}}.{key.format(ve=suffix)}" for key in names.keys)
        return len(order) + (None, *MODALITIES).index(modality), HFParameter(parameter, keys, names.transform)

    return tuple(found for _, found in sorted(map(placed, parameters(model)), key=lambda found: found[0]))


def hf_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Every key that the model's HF files hold, with its shape."""
    return {
        slot.key: slot.shape for found in hf_parameters(model) for _, theirs in found.slots(model) for slot in theirs
    }
