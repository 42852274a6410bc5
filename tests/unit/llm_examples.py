"""Small pretrained LLMs of every family, as transformers saves them, for the tests of a start from one."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from navil_megatron.blueprint.parameters import Shape
from navil_megatron.hf.hf_parameters import Slot
from navil_megatron.hf.jobs import Job

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VISION = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 2}
CLASSES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def save_random_llm(family: str, seed: int, folder: Path) -> PreTrainedModel:
    """Saves an LLM of random sizes and weights (std 0.2) and gives transformers' own model of it.

    transformers has no InternLM2: its peer is the Llama with the same weights, which are saved under InternLM2's names.
    """
    draw = random.Random(f"{family} {seed}")
    settings = random_settings(family, draw)
    config_class, model_class = CLASSES.get(family, CLASSES["llama"])
    model = model_class(config_class(**settings)).eval()
    fill(model, seed)
    if family != "internlm2":
        model.save_pretrained(folder)
        return model
    folder.mkdir(parents=True)
    save_file(as_internlm2(model), folder / "model.safetensors")
    kept = {key: value for key, value in settings.items() if key not in ("attention_bias", "mlp_bias", "head_dim")}
    config = kept | {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
    config["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def random_settings(family: str, draw: random.Random) -> dict[str, Any]:
    """Sizes that rarely coincide; tied tables, scaled rotary frequencies and odd head sizes come up by chance."""
    groups = draw.choice((1, 2, 3))
    heads = groups * draw.choice((1, 2, 3))
    head_dim = 2 * draw.randint(2, 8)
    hidden = heads * head_dim if family == "internlm2" else heads * draw.randint(3, 9)
    settings: dict[str, Any] = {
        "num_hidden_layers": draw.randint(1, 3),
        "hidden_size": hidden,
        "intermediate_size": draw.randint(5, 60),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "vocab_size": draw.randint(50, 90),
        "tie_word_embeddings": draw.random() < 0.5,
        "rms_norm_eps": draw.choice((1e-5, 1e-6)),
        "max_position_embeddings": 256,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(draw.choice((10_000, 500_000, 1_000_000)))},
    }
    if family == "qwen2":
        # Its class has no such key: hidden size over heads.
        settings["hidden_size"] = heads * settings.pop("head_dim")
    if family == "llama" and draw.random() < 0.5:
        settings["rope_parameters"] = LLAMA3_ROPE | {"rope_theta": 500_000.0}
    return settings


@torch.no_grad()
def fill(model: PreTrainedModel, seed: int) -> None:
    """Weights and biases N(0, 0.2), norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.copy_(values + 1 if "norm" in name else values)


def as_internlm2(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a Llama under InternLM2's names; q, k and v interleaved by hand, group by group."""
    config, weights = model.config, model.state_dict()
    channels, per_group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    renamed = {
        "model.tok_embeddings.weight": weights["model.embed_tokens.weight"],
        "model.norm.weight": weights["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        renamed["output.weight"] = weights["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        theirs, mine = f"model.layers.{layer}", f"model.layers.{layer}"
        q, k, v = (weights[f"{theirs}.self_attn.{part}_proj.weight"].split(channels) for part in "qkv")
        rows = []
        for group in range(config.num_key_value_heads):
            rows += [*q[group * per_group : (group + 1) * per_group], k[group], v[group]]
        renamed[f"{mine}.attention.wqkv.weight"] = torch.cat(rows)
        for old, new in (
            ("self_attn.o_proj", "attention.wo"),
            ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.up_proj", "feed_forward.w3"),
            ("mlp.down_proj", "feed_forward.w2"),
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            renamed[f"{mine}.{new}.weight"] = weights[f"{theirs}.{old}.weight"]
    return {key: tensor.clone().contiguous() for key, tensor in renamed.items()}


def sources_of(jobs: list[Job]) -> dict[str, Shape]:
    """Key and shape of every tensor that the jobs read."""
    return {slot.key: slot.shape for job in jobs for slot in job.sources}


def run_in_memory(jobs: list[Job], stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the jobs write, each tensor whole; the converter's engine does the same from disk to disk."""
    written: dict[str, torch.Tensor] = {}
    for job in jobs:
        targets = job.function(tuple(_read(stored, slot) for slot in job.sources))
        for slot, tensor in zip(job.targets, targets, strict=True):
            assert tensor.shape == slot.shape, slot
            tensor = tensor.to(job.dtype or tensor.dtype)
            if slot.layer is None:
                assert slot.key not in written, slot
                written[slot.key] = tensor
            else:
                shape = (slot.num_layers, *slot.shape)
                whole = written.setdefault(slot.key, torch.full(shape, torch.nan, dtype=tensor.dtype))
                assert whole[slot.layer].isnan().all(), f"{slot} is written twice"
                whole[slot.layer] = tensor
    return written


def _read(stored: Mapping[str, torch.Tensor], slot: Slot) -> torch.Tensor:
    tensor = stored[slot.key] if slot.layer is None else stored[slot.key][slot.layer]
    assert tensor.shape == slot.shape, slot
    return tensor
