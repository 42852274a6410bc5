"""How large the benchmarks of ``gpu.py`` are, on a GPU and when rehearsed on a CPU, and what all of them do.

A row of 16,384 tokens, four in five of them visual. Gradients are summed in FP32 as in training.
"""

import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from turns import clock

from navil_megatron.config.load import config_to_dict, section_from_dict
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.validate import validate
from navil_megatron.data.types import Microbatch
from navil_megatron.models.build import build_model
from navil_megatron.models.inputs import ModelInputs
from navil_megatron.models.navil_model import NaViLModel
from navil_megatron.runtime.session import Session
from navil_megatron.training.batch import build_model_inputs
from navil_megatron.training.optimizer import wrap_ddp
from tests.real_sizes import NAVIL_2B, NAVIL_9B
from tools.bench.synthetic import synthetic_microbatch

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
"""Name -> fields of [runtime] and of [precision]."""

type Measurements = list[partial[dict[str, Any]]]
"""Those of a benchmark, each of which builds what it needs; keywords say what it is of."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of every benchmark."""

    device: str
    """As in the config."""
    rounds: int
    """Timed rounds."""
    warm: int
    """Rounds before them."""
    models: dict[str, ModelConfig]
    """The shapes whose layers are timed."""
    whole: ModelConfig
    """The model of whole steps, NaViL-2B."""
    tokens: int
    """Of a row."""
    samples: list[tuple[int, tuple[tuple[int, int], ...]]]
    """Text tokens and grids in patches of the row's samples."""
    choices: tuple[str, ...]
    """Of ``CHOICES``."""
    decoder_layers: int
    """How many are timed at once: what they keep for the backward pass fits a GPU of 80 GB."""
    encoder_layers: int
    """The same."""
    experts_layers: int
    """Decoder layers of each way to route; all ways are on the device at once."""
    photos: int
    """JPEG files behind the whole step."""
    megapixels: tuple[float, ...]
    """Their sizes, in turn."""
    image_pixels: tuple[int, int]
    """Smallest and largest area of an image."""
    loader_threads: int
    """Of the loader."""
    microbatches: int
    """Rows of a whole step."""
    step_rounds: int
    """Timed whole steps."""
    depth: int | None
    """Layers of decoder and encoder in a whole step; None: as many as the planner says fit."""

    @property
    def bf16_choices(self) -> list[str]:
        """Those without FP8."""
        return [choice for choice in self.choices if not CHOICES[choice][1]]


ON_GPU = Scale(
    device="cuda",
    rounds=10,
    warm=3,
    models={"2b": NAVIL_2B, "9b": NAVIL_9B},
    whole=NAVIL_2B,
    tokens=16_384,
    samples=[(200, ((64, 52),))] * 15,  # 832 image tokens each
    choices=tuple(CHOICES),
    decoder_layers=4,
    encoder_layers=6,
    experts_layers=2,
    photos=48,
    megapixels=(0.3, 0.3, 1, 0.3, 1, 4),
    image_pixels=(65_536, 1_048_576),
    loader_threads=8,
    microbatches=4,
    step_rounds=5,
    depth=None,
)


def _tiny(model: ModelConfig) -> ModelConfig:
    language = replace(
        model.language,
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=16,
        vocab_size=1_024,
    )
    vision = replace(model.vision, num_layers=2, hidden_size=48, ffn_hidden_size=64, num_attention_heads=2)
    return ModelConfig(language=language, vision=vision, special_token_ids=tuple(range(1_012, 1_024)))


REHEARSAL = Scale(
    device="cpu",
    rounds=1,
    warm=1,
    models={"9b": _tiny(NAVIL_9B)},
    whole=_tiny(NAVIL_2B),
    tokens=256,
    samples=[(40, ((16, 8),))] * 2,
    choices=("torch",),
    decoder_layers=1,
    encoder_layers=1,
    experts_layers=1,
    photos=4,
    megapixels=(0.02, 0.03),
    image_pixels=(4_096, 49_152),
    loader_threads=1,
    microbatches=2,
    step_rounds=1,
    depth=2,
)
"""Small enough for a test; its figures mean nothing."""


def run_config(scale: Scale, model: ModelConfig, choice: str, **sections: dict[str, Any]) -> NaViLConfig:
    """A run of a model with these kernels; ``sections`` add fields to those of the config."""
    runtime, precision = CHOICES[choice]
    smallest, largest = scale.image_pixels
    data = {"train_sources": [{"index": "none"}], "tokenizer": "none", "seq_length": scale.tokens}
    data |= {"min_image_pixels": smallest, "max_image_pixels": largest, "pad_segments_to": 128}
    base: dict[str, dict[str, Any]] = {
        "model": config_to_dict(model),
        "data": data,
        "training": {"train_steps": 1, "global_batch_size": 1},
        "precision": precision,
        "optimizer": {"lr": 1e-4, "warmup_steps": 0},
        "checkpoint": {"directory": "none"},
        "runtime": {"device": scale.device, **runtime},
        "logging": {"directory": tempfile.gettempdir()},
    }
    config = section_from_dict(
        NaViLConfig, {name: {**base[name], **sections.get(name, {})} for name in base}, "the benchmark"
    )
    validate(config, 1)
    return config


def cut(model: ModelConfig, num_layers: int, encoder_layers: int) -> ModelConfig:
    """A model of these depths."""
    return replace(
        model,
        language=replace(model.language, num_layers=num_layers),
        vision=replace(model.vision, num_layers=encoder_layers),
    )


def give_back() -> None:
    """What the benchmark before has left on the device."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


@contextmanager
def built(config: NaViLConfig, scale: Scale) -> Iterator[tuple[Any, ModelInputs, Microbatch]]:
    """The model as training wraps it, and a row on its device."""
    give_back()
    with Session.start(config) as session:
        microbatch = synthetic_microbatch(config.model, scale.tokens, 0, [scale.samples], pad_segments_to=128)
        model: list[NaViLModel] = build_model(config, session.groups, session.device)
        (chunk,) = wrap_ddp(config, session, model)
        yield chunk, session.platform.upload(build_model_inputs(microbatch))(), microbatch


def measure(step: Callable[[], None], chunk: Any, scale: Scale, forward: float) -> dict[str, Any]:
    """Median and spread of a forward and backward pass; ``forward`` FLOPs, the backward pass costs twice that."""
    device = torch.device(scale.device)
    seconds = []
    for number in range(scale.warm + scale.rounds):
        chunk.zero_grad_buffer()
        if number == scale.warm and scale.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = clock(device)
        step()
        seconds.append(clock(device) - started)
    return {**speed(seconds[scale.warm :], 3 * forward, scale), "peak_memory_gib": peak_gib(scale)}


def speed(seconds: list[float], flops: float, scale: Scale) -> dict[str, Any]:
    """Median and spread of some rounds, and what they computed a second."""
    median = statistics.median(seconds)
    name = torch.cuda.get_device_name() if scale.device == "cuda" else ""
    peak = next((value for part, value in BF16_PEAK.items() if part in name), None)
    return {
        "milliseconds": round(median * 1e3, 3),
        "fastest_slowest": [round(min(seconds) * 1e3, 3), round(max(seconds) * 1e3, 3)],
        "tflops_per_second": round(flops / median / 1e12, 1),
        "mfu": round(flops / median / peak, 4) if peak else None,
    }


def peak_gib(scale: Scale) -> float | None:
    """Most memory allocated on the GPU since the last reset."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if scale.device == "cuda" else None
