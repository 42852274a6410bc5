"""Decoder layers, encoder and loss head of NaViL-2B and -9B on one GPU, forward and backward, by kernels and precision.

A row of 16,384 tokens, four in five of them visual. Gradients are summed in FP32 as in training.
"""

import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from navil_megatron.config.load import config_from_dict, config_to_dict
from navil_megatron.config.schema import ModelConfig, NaViLConfig
from navil_megatron.config.validate import validate
from navil_megatron.data.synthetic import synthetic_microbatch
from navil_megatron.data.types import Microbatch
from navil_megatron.layers.rope import cos_sin, decoder_angles
from navil_megatron.models.build import build_model
from navil_megatron.models.inputs import ModelInputs
from navil_megatron.models.navil_model import NaViLModel
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import build_model_inputs
from navil_megatron.training.flops import forward_flops
from navil_megatron.training.optimizer import wrap_ddp
from tests.real_sizes import NAVIL_2B, NAVIL_9B

TOKENS = 16_384
SAMPLES = [(200, ((64, 52),))] * 15
"""Text tokens and grids in patches: 832 image tokens each."""
MODELS = {"2b": NAVIL_2B, "9b": NAVIL_9B}
DECODER_LAYERS, ENCODER_LAYERS = 4, 6
"""How many are timed at once: what they keep for the backward pass fits a GPU of 80 GB."""
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Part of a GPU's name -> dense BF16 products a second, as its maker says."""
ENGINE = {"kernels": "transformer_engine", "gradient_accumulation_fusion": "transformer_engine"}
CHOICES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "torch": ({}, {}),
    "engine": (ENGINE, {}),
    "engine-delayed": (ENGINE, {"fp8": "delayed"}),
    "engine-tensorwise": (ENGINE, {"fp8": "tensorwise"}),
    "engine-blockwise": (ENGINE, {"fp8": "blockwise"}),
}
"""Name -> fields of [runtime] and of [training]."""


def decoder_layers(rounds: int) -> list[dict[str, Any]]:
    """Decoder layers alone, by every choice of kernels."""
    return [_decoder_layers(size, choice, rounds) for size in MODELS for choice in CHOICES]


def encoder(rounds: int) -> list[dict[str, Any]]:
    """Encoder layers, and the patch embedding, on the row's images."""
    return [
        _encoder(size, choice, rounds)
        for size in MODELS
        for choice in ("torch", "engine", "engine-tensorwise", "engine-blockwise")
    ]


def loss_head(rounds: int) -> list[dict[str, Any]]:
    """LM head and cross entropy at the predicted positions."""
    return [_loss_head(size, rounds) for size in MODELS]


def _decoder_layers(size: str, choice: str, rounds: int) -> dict[str, Any]:
    model = MODELS[size]
    config = run_config(model, choice, num_layers=DECODER_LAYERS, encoder_layers=0)
    with built(config) as (chunk, inputs, microbatch):
        hidden = random_rows(model)
        rotary = cos_sin(decoder_angles(inputs.position_ids, model.language), torch.bfloat16)

        def step() -> None:
            output = chunk.module.decoder(
                hidden, None, rotary_pos_emb=rotary, packed_seq_params=inputs.packed_seq_params
            )
            output.backward(hidden.detach())

        # No encoder layer runs here, so the terms without a name are the decoder's attention.
        flops = sum(f for name, f in forward_flops(config.model, microbatch) if name.startswith("decoder.") or not name)
        measured = measure(step, chunk, rounds, flops)
    return {"model": size, "kernels": choice, "layers": DECODER_LAYERS, "tokens": TOKENS, **measured}


def _encoder(size: str, choice: str, rounds: int) -> dict[str, Any]:
    model = MODELS[size]
    config = run_config(model, choice, num_layers=1, encoder_layers=ENCODER_LAYERS)
    if config.training.fp8 != "none":
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, fp8_encoder=True))
    with built(config) as (chunk, inputs, microbatch):
        first = inputs.first_stage
        assert first is not None

        def step() -> None:
            features = chunk.module.vision_encoder(first.pixel_values, first.vision_plan)
            features.backward(features.detach())

        (_, products), (_, attention), *_ = forward_flops(config.model, microbatch)
        measured = measure(step, chunk, rounds, products + attention)
    return {
        "model": size,
        "kernels": choice,
        "layers": ENCODER_LAYERS,
        "patches": first.pixel_values.shape[0],
        **measured,
    }


def _loss_head(size: str, rounds: int) -> dict[str, Any]:
    model = MODELS[size]
    config = run_config(model, "torch", num_layers=1, encoder_layers=0)
    with built(config) as (chunk, inputs, microbatch):
        hidden = random_rows(model)

        def step() -> None:
            chunk.module.predict(hidden, inputs).sum().backward()

        flops = sum(f for name, f in forward_flops(config.model, microbatch) if name.startswith("output_layer"))
        measured = measure(step, chunk, rounds, flops)
    predicted = inputs.loss_positions.numel()
    return {"model": size, "predicted": predicted, "vocabulary": model.language.vocab_size, **measured}


def random_rows(model: ModelConfig) -> Tensor:
    """[t, 1, h] of the residual stream."""
    width = model.language.hidden_size
    return torch.randn(TOKENS, 1, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def run_config(model: ModelConfig, choice: str, *, num_layers: int, encoder_layers: int) -> NaViLConfig:
    """A run of a model cut to these depths."""
    runtime, training = CHOICES[choice]
    sections = config_to_dict(model)
    sections["language"]["num_layers"] = num_layers
    sections["vision"]["num_layers"] = encoder_layers
    config = config_from_dict(
        {
            "model": sections,
            "data": {
                "train_sources": [{"index": "none"}],
                "tokenizer": "none",
                "seq_length": TOKENS,
                "pad_segments_to": 128,
            },
            "training": {"train_steps": 1, "global_batch_size": 1, **training},
            "optimizer": {"lr": 1e-4, "warmup_steps": 0},
            "checkpoint": {"directory": "none"},
            "runtime": {"device": "cuda", **runtime},
            "logging": {"directory": tempfile.gettempdir()},
        },
        "the benchmark",
    )
    validate(config, 1)
    return config


@contextmanager
def built(config: NaViLConfig) -> Iterator[tuple[Any, ModelInputs, Microbatch]]:
    """The model as training wraps it, and a row on its device; what the one before left is given back first."""
    gc.collect()
    torch.cuda.empty_cache()
    with Session.start(config) as session:
        microbatch = synthetic_microbatch(config.model, TOKENS, 0, SAMPLES, pad_segments_to=128)
        model: list[NaViLModel] = build_model(config, session.groups, session.device)
        (chunk,) = wrap_ddp(config, session, model)
        yield chunk, build_model_inputs(microbatch, config.model, session.device), microbatch


def measure(step: Callable[[], None], chunk: Any, rounds: int, forward: float) -> dict[str, Any]:
    """Median and spread of a forward and backward pass; ``forward`` FLOPs, the backward pass costs twice that."""
    seconds = []
    for number in range(rounds + 3):
        chunk.zero_grad_buffer()
        if number == 3:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    timed = sorted(seconds[3:])
    median = statistics.median(timed)
    peak = next((value for name, value in BF16_PEAK.items() if name in torch.cuda.get_device_name()), None)
    return {
        "milliseconds": round(median * 1e3, 3),
        "fastest_slowest": [round(timed[0] * 1e3, 3), round(timed[-1] * 1e3, 3)],
        "tflops_per_second": round(3 * forward / median / 1e12, 1),
        "mfu": round(3 * forward / median / peak, 4) if peak else None,
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }
