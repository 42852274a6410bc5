"""Whole training steps of NaViL-2B on real JPEGs: how fast beside its decoder alone, and where the time goes.

The model keeps the ratio of its depths and has as many layers as the planner finds room for. Everything trains
(phase s2), the optimizer runs, the encoder is recomputed as in ``examples/navil_2b``, images come from the loader.
"""

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from gpu_scale import Measurements, Scale, cut, give_back, peak_gib, run_config, speed
from photos import photo_shards
from profile_shares import summarize
from torch.profiler import ProfilerActivity
from turns import clock

from navil_megatron.blueprint.flops import backward_flops, head_terms, layer_terms, training_flops
from navil_megatron.blueprint.workload import typical_workload
from navil_megatron.config.model import ModelConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.loader import TrainLoader
from navil_megatron.data.types import ALONE, Microbatch
from navil_megatron.models.build import build_model
from navil_megatron.planner.estimate import Estimator
from navil_megatron.planner.hardware import Hardware
from navil_megatron.runtime.session import Session
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step

WARM_STEPS = 2
ROOM = 0.85
"""Share of the GPU's memory that the planner may fill: it has not been compared with one."""


@dataclass(frozen=True)
class Run:
    """A training run in the middle of it."""

    config: NaViLConfig
    session: Session
    chunks: list[Any]
    optimizer: Any
    loader: TrainLoader | None = None

    def step(self, microbatches: Sequence[Microbatch]) -> None:
        """One update."""
        train_step(self.config, self.session, self.chunks, self.optimizer, microbatches, lr=1e-5)


def whole_step(scale: Scale) -> Measurements:
    """Steps fed by the loader beside those of the decoder alone, by every choice of kernels."""
    return [partial(_whole_step, scale, choice=choice) for choice in scale.choices]


def profile(scale: Scale) -> Measurements:
    """One whole step under torch's profiler: shares of its time by kind of kernel, and the ten longest."""
    return [partial(_profile, scale, choice=choice) for choice in scale.bf16_choices]


def _whole_step(scale: Scale, choice: str) -> dict[str, Any]:
    """Steps fed by the loader, and the decoder alone on the rows of the last of them, its visual features given."""
    with started(scale, choice) as run:
        seconds, waits, flops = [], [], []
        for _ in range(WARM_STEPS):
            run.step(next(run.loader).microbatches)
        reset_peak(scale)
        for _ in range(scale.step_rounds):
            begun = clock(run.session.device)
            rows = next(run.loader).microbatches
            run.step(rows)
            seconds.append(clock(run.session.device) - begun)
            waits.append(run.loader.wait_seconds)
            flops.append(sum(training_flops(run.config.model, row.workload, run.config.training.phase) for row in rows))
        whole = {
            **speed(seconds, statistics.fmean(flops), scale),
            "tflop": statistics.fmean(flops) / 1e12,
            "share_waiting_for_data": round(sum(waits) / sum(seconds), 4),
            "peak_memory_gib": peak_gib(scale),
            "planned_memory_gib": round(planned_bytes(run.config) / 2**30, 2),
        }
        decoder_config = dataclasses.replace(
            run.config, model=cut(run.config.model, run.config.model.language.num_layers, 0)
        )
        rows = [dataclasses.replace(row, pixel_values=row.pixel_values.to(run.session.device)) for row in rows]
        result = about(run, scale, choice)
    del run
    decoder = decoder_step(decoder_config, scale, rows)
    ratio = (whole["tflop"] / whole["milliseconds"]) / (decoder["tflop"] / decoder["milliseconds"])
    return {**result, "ratio": round(ratio, 4), "whole": whole, "decoder_only": decoder}


def decoder_step(config: NaViLConfig, scale: Scale, rows: Sequence[Microbatch]) -> dict[str, Any]:
    """The same rows without an encoder: features are constants on the device, rows are in its memory."""
    give_back()
    language, flops = config.model.language, 0.0
    for row in rows:
        work = row.workload
        terms = [(part, f * language.num_layers) for part, f in layer_terms(config.model, work)]
        terms += head_terms(config.model, work)
        flops += sum(f for _, f in terms) + backward_flops(terms, config.training.phase)
    with running(config) as run:
        most = max(int((row.input_ids == config.model.special_token_id("<IMG_CONTEXT>")).sum()) for row in rows)
        features = torch.randn(most, language.hidden_size, device=run.session.device, dtype=torch.bfloat16)
        run.chunks[0].module.encode_images = lambda first: features[: first.image_positions.numel()]
        seconds = []
        for _ in range(WARM_STEPS):
            run.step(rows)
        reset_peak(scale)
        for _ in range(scale.step_rounds):
            begun = clock(run.session.device)
            run.step(rows)
            seconds.append(clock(run.session.device) - begun)
    return {**speed(seconds, flops, scale), "tflop": flops / 1e12, "peak_memory_gib": peak_gib(scale)}


def _profile(scale: Scale, choice: str) -> dict[str, Any]:
    on_gpu = scale.device == "cuda"
    with started(scale, choice) as run:
        for _ in range(WARM_STEPS):
            run.step(next(run.loader).microbatches)
        # Of a GPU its kernels alone: noting every call on the host would make the GPU wait for it.
        activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
        clock(run.session.device)
        with torch.profiler.profile(activities=activities) as profiler:
            begun = time.perf_counter()
            run.step(next(run.loader).microbatches)
            clock(run.session.device)
            wall = (time.perf_counter() - begun) * 1e6
        result = about(run, scale, choice)
    events = [event for event in profiler.events() if not event.is_user_annotation and "#" not in event.name]
    if on_gpu:
        # Kernels of several streams overlap: what is busy is their union.
        kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        spans = [(event.name, event.time_range.start, event.time_range.end) for event in kernels]
    else:
        # No kernels here: what each operator took by itself, laid end to end.
        kernels = [event for event in events if event.name.startswith(("aten::", "c10d::"))]
        ends = list(accumulate(event.self_cpu_time_total for event in kernels))
        spans = [(event.name, end - event.self_cpu_time_total, end) for event, end in zip(kernels, ends, strict=True)]
    summary = summarize(spans, wall)
    print(", ".join(f"{kind} {share:.1%}" for kind, share in summary["shares"].items()))
    return {**result, **summary}


@contextmanager
def started(scale: Scale, choice: str) -> Iterator[Run]:
    """A run of NaViL-2B over shards of photos that are made first."""
    give_back()
    with tempfile.TemporaryDirectory() as folder:
        index, tokenizer, _ = photo_shards(Path(folder), scale.photos, scale.megapixels)
        model = dataclasses.replace(scale.whole, special_token_ids=tokenizer.special_token_ids)
        has_dali = scale.device == "cuda" and find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
        sections: dict[str, Any] = {
            "data": {
                "train_sources": [{"index": str(index)}],
                "tokenizer": str(Path(folder) / "tokenizer"),
                "image_decoder": "dali" if has_dali else "pillow",
                "num_workers": scale.loader_threads,
                "prefetch_steps": 2,
            },
            "training": {
                "train_steps": 100,
                "global_batch_size": scale.microbatches,
                "phase": "s2",
                "recompute": "selective",
                "recompute_modules": ["encoder"],
            },
        }
        room = math.inf if scale.depth else ROOM * torch.cuda.get_device_properties(0).total_memory
        deepest = scale.depth or model.language.num_layers
        config = deepest_that_fits(scale, model, choice, deepest, room, **sections)
        with running(config) as run, closing(TrainLoader(config, ALONE)) as loader:
            yield dataclasses.replace(run, loader=loader)


def deepest_that_fits(
    scale: Scale, model: ModelConfig, choice: str, deepest: int, room: float, **sections: dict[str, Any]
) -> NaViLConfig:
    """The run with as many layers, up to ``deepest``, as the planner finds room for."""
    for depth in range(deepest, 0, -1):
        encoder_layers = max(1, round(depth * model.vision.num_layers / model.language.num_layers))
        config = run_config(scale, cut(model, depth, encoder_layers), choice, **sections)
        if planned_bytes(config) <= room:
            return config
    raise RuntimeError(f"not even one layer fits {room / 2**30:.0f} GiB")


@contextmanager
def running(config: NaViLConfig) -> Iterator[Run]:
    """The model and its optimizer as ``training.loop`` builds them, without data."""
    with Session.start(config) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        yield Run(config, session, chunks, build_optimizer(config, chunks, session))


def planned_bytes(config: NaViLConfig) -> float:
    """What the planner expects at the fullest moment, for rows of images of the largest size."""
    work = typical_workload(config, text_tokens=64, image_side=round(config.data.max_image_pixels**0.5))
    return Estimator(config, Hardware(gpus=1), work).estimate().fullest.peak


def about(run: Run, scale: Scale, choice: str) -> dict[str, Any]:
    """What was run."""
    model = run.config.model
    return {
        "model": "2b",
        "kernels": choice,
        "layers": model.language.num_layers,
        "encoder_layers": model.vision.num_layers,
        "tokens": scale.tokens,
        "microbatches": scale.microbatches,
        "image_decoder": run.config.data.image_decoder,
    }


def reset_peak(scale: Scale) -> None:
    """Peaks count from here."""
    if scale.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
