"""Decoder layers, encoder, loss head and modality experts of NaViL-2B and -9B, forward and backward, each alone."""

import dataclasses
from typing import Any

import experts as expert_ways
import loss_head as loss_heads
import torch
from gpu_scale import CHOICES, Scale, built, cut, give_back, measure, run_config
from torch import Tensor

from navil_megatron.blueprint.flops import forward_terms
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.layers.rope import cos_sin, decoder_angles
from navil_megatron.runtime.session import Session
from tools.bench.synthetic import synthetic_microbatch

Results = list[dict[str, Any]]
AROUND = ("vision_encoder", "connector", "output_layer")
"""Parts before and behind the decoder."""


def decoder_layers(scale: Scale) -> Results:
    """Decoder layers alone, by every choice of kernels."""
    return [_decoder_layers(scale, size, choice) for size in scale.models for choice in scale.choices]


def encoder(scale: Scale) -> Results:
    """Encoder layers, and the patch embedding, on the row's images."""
    choices = [choice for choice in scale.choices if CHOICES[choice][1].get("fp8") != "delayed"]
    return [_encoder(scale, size, choice) for size in scale.models for choice in choices]


def loss_head(scale: Scale) -> Results:
    """LM head and cross entropy at the predicted positions of the row, and against peers there and at every token."""
    return [_loss_head(scale, size) for size in scale.models]


def experts(scale: Scale) -> Results:
    """Modality-major rows against masks, the released way and core's ``MoELayer``: see ``experts.py``."""
    choices = [choice for choice in scale.choices if choice in ("torch", "engine")]
    return [_experts(scale, size, choice) for size in scale.models for choice in choices]


def _decoder_layers(scale: Scale, size: str, choice: str) -> dict[str, Any]:
    model = cut(scale.models[size], scale.decoder_layers, 0)
    config = run_config(scale, model, choice)
    with built(config, scale) as (chunk, inputs, microbatch):
        hidden = random_rows(scale, model)
        rotary = cos_sin(decoder_angles(inputs.position_ids, model.language))

        def step() -> None:
            output = chunk.module.decoder(
                hidden, None, rotary_pos_emb=rotary, packed_seq_params=inputs.packed_seq_params
            )
            output.backward(hidden.detach())

        # No encoder layer runs here, so the softmax is the decoder's.
        flops = sum(f for part, f in forward_terms(model, microbatch.workload) if part not in AROUND)
        measured = measure(step, chunk, scale, flops)
    return {"model": size, "kernels": choice, "layers": scale.decoder_layers, "tokens": scale.tokens, **measured}


def _encoder(scale: Scale, size: str, choice: str) -> dict[str, Any]:
    config = run_config(scale, cut(scale.models[size], 1, scale.encoder_layers), choice)
    if config.precision.fp8 != "none":
        config = dataclasses.replace(config, precision=dataclasses.replace(config.precision, fp8_encoder=True))
    with built(config, scale) as (chunk, inputs, microbatch):
        first = inputs.first_stage
        assert first is not None

        def step() -> None:
            features = chunk.module.vision_encoder(first.encoder)
            features.backward(features.detach())

        (_, products), (_, attention), *_ = forward_terms(config.model, microbatch.workload)
        measured = measure(step, chunk, scale, products + attention)
    patches = first.encoder.patch_index.numel()
    return {"model": size, "kernels": choice, "layers": scale.encoder_layers, "patches": patches, **measured}


def _loss_head(scale: Scale, size: str) -> dict[str, Any]:
    model = cut(scale.models[size], 1, 0)
    config = run_config(scale, model, "torch")
    measured = _predict(scale, config)
    give_back()
    with Session.start(config) as session:
        peers = {
            positions: loss_heads.compare(config, session, positions, scale.rounds)
            for positions in (measured["predicted"], scale.tokens)
        }
    return {"model": size, "vocabulary": model.language.vocab_size, **measured, "peers_by_positions": peers}


def _predict(scale: Scale, config: NaViLConfig) -> dict[str, Any]:
    with built(config, scale) as (chunk, inputs, microbatch):
        hidden = random_rows(scale, config.model)

        def step() -> None:
            chunk.module.predict(hidden, inputs).sum().backward()

        flops = sum(f for name, f in forward_terms(config.model, microbatch.workload) if name == "output_layer")
        return {"predicted": inputs.loss_positions.numel(), **measure(step, chunk, scale, flops)}


def _experts(scale: Scale, size: str, choice: str) -> dict[str, Any]:
    model = cut(scale.models[size], scale.experts_layers, 0)
    # Embeddings and head are not compared: a small vocabulary leaves their memory to the copies of the decoder.
    language = dataclasses.replace(model.language, vocab_size=1_024, **expert_ways.PLAIN)
    model = dataclasses.replace(model, language=language, special_token_ids=tuple(range(1_012, 1_024)))
    # Gradients are compared as autograd gives them.
    config = run_config(scale, model, choice, runtime={"gradient_accumulation_fusion": "none"})
    give_back()
    row = synthetic_microbatch(model, scale.tokens, 0, [scale.samples], pad_segments_to=128)
    ratios = expert_ways.compare(config, row, scale.rounds)
    return {"model": size, "kernels": choice, "layers": scale.experts_layers, "tokens": scale.tokens, "ratios": ratios}


def random_rows(scale: Scale, model: ModelConfig) -> Tensor:
    """[t, 1, h] of the residual stream."""
    shape = (scale.tokens, 1, model.language.hidden_size)
    return torch.randn(shape, device=scale.device, dtype=torch.bfloat16, requires_grad=True)
