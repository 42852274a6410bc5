"""Small models and their weights for the tests of hf/."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from navil_megatron.config.language import FAMILIES as FAMILY_TRAITS
from navil_megatron.config.language import LanguageConfig
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.vision import VisionConfig
from navil_megatron.data.tokenizer import SampleTokenizer, build_tokenizer
from navil_megatron.files.atomic_folder import new_folder
from navil_megatron.hf.hf_parameters import hf_shapes
from tests.whole_checkpoint import hf_to_mcore, write_tensors

FAMILIES = tuple(FAMILY_TRAITS)
CAPTIONS = ("a red square", "a blue circle left of a green star")


def tiny_model(family: str = "qwen3", **vision: Any) -> ModelConfig:
    """Every size differs from every other, so that a swapped axis shows."""
    internlm2, llama = family == "internlm2", family == "llama"
    language = LanguageConfig(
        family=family,
        num_layers=2,
        hidden_size=48,
        ffn_hidden_size=56,
        num_attention_heads=6,
        num_query_groups=2,
        head_dim=8 if internlm2 else 16,
        vocab_size=400,
        **FAMILY_TRAITS[family].fixed,
        composed_visual_output_projection=internlm2,
        norm_epsilon=1e-5 if internlm2 else 1e-6,
        rope_scaling_factor=8.0 if llama else None,
        rope_original_length=32 if llama else 8_192,
        tied_embeddings=llama,
    )
    settings: dict[str, Any] = {"num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 72, "num_attention_heads": 4}
    return ModelConfig(
        language=language,
        vision=VisionConfig(**(settings | vision)),
        special_token_ids=tuple(range(388, 400)),
    )


def with_tokenizer(model: ModelConfig, tokenizer: SampleTokenizer) -> ModelConfig:
    """The model with the tokenizer's ids and as many rows as it needs."""
    language = dataclasses.replace(model.language, vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(model, language=language, special_token_ids=tokenizer.special_token_ids)


def tiny_tokenizer(folder: Path) -> SampleTokenizer:
    """A tokenizer over two captions, saved in ``folder``."""
    return build_tokenizer(CAPTIONS, folder)


def random_hf_tensors(model: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights large enough that a wrong expert shows, norms around one."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for key, shape in hf_shapes(model).items():
        values = torch.randn(shape, generator=generator) * 0.2
        tensors[key] = (values + 1 if "norm" in key and key.endswith("weight") else values).to(dtype)
    return tensors


def write_checkpoint(
    folder: Path, model: ModelConfig, dtype: torch.dtype = torch.float32, data: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """A checkpoint of random weights; gives them under their HF keys."""
    tensors = random_hf_tensors(model, dtype)
    with new_folder(folder) as partial:
        write_tensors(partial, hf_to_mcore(tensors, model), model, data or {})
    return tensors
