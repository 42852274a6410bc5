"""``navil-megatron train --dry-run``: everything of a run that can be checked on a machine without a GPU.

The config is validated for its GPUs, the data is opened where it is here, and every pipeline stage is built with its
optimizer by the code of a real run, on the meta device. ``--step`` takes a step of each too (``dry_step``).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from navil_megatron.blueprint.workload import typical_workload
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.validate import validate
from navil_megatron.data.loader import load_run_tokenizer, open_sources
from navil_megatron.dry_step import dry_step
from navil_megatron.models.build import build_model
from navil_megatron.planner.estimate import Estimator
from navil_megatron.planner.hardware import Hardware
from navil_megatron.planner.report import memory_lines, parameter_lines
from navil_megatron.planner.search import what_is_too_large
from navil_megatron.runtime.logs import configure_logging
from navil_megatron.runtime.meta_rank import meta_rank
from navil_megatron.runtime.platform import require_device_of_kernels
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp

_TEXT_TOKENS, _IMAGE_SIDE = 256, 1024
"""Of a typical sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltRank:
    """What one rank was found to hold."""

    stage: int
    expert: int
    """Place in the expert-parallel group."""
    sizes: dict[str, int]
    """Numbers of each parameter."""
    num_trained: int
    num_groups: int
    """Parameter groups of the optimizer, with weight decay and without."""
    optimizer_bytes: int
    """Moments and master weights."""


def dry_run(config: NaViLConfig, gpus: int | None = None, step: bool = False) -> str:
    """What a run on so many GPUs would be, by default on the fewest that hold the layout; with a step of each stage.

    Raises:
        UserError: The run would be refused: its settings, its layout on these GPUs, or its data.
        DeviceError: In the step the host would wait for the device, or a tensor is on the wrong one.
    """
    parallel = config.parallel
    gpus = gpus or lcm(parallel.model_parallel_size, parallel.expert_ranks)
    validate(config, gpus)
    require_device_of_kernels(config.runtime)
    configure_logging(rank=0, world_size=1)
    lines = [f"settings and layout are valid on {gpus} GPUs", *_data_lines(config), "", *parameter_lines(config), ""]
    # First, for the builds put core into its CPU form.
    steps = ["", *dry_step(config, gpus, _TEXT_TOKENS, _IMAGE_SIDE)] if step else []
    for built in build_ranks(config, gpus):
        expert = f", expert rank {built.expert}" if parallel.expert_model_parallel_size > 1 else ""
        lines.append(
            f"stage {built.stage}{expert}: {sum(built.sizes.values()):,} parameters a rank, {built.num_trained:,} "
            f"trained in {built.num_groups} groups, optimizer state {built.optimizer_bytes / 1e9:.2f} GB"
        )
    return "\n".join([*lines, *_memory_lines(config, gpus), *steps])


def build_ranks(config: NaViLConfig, gpus: int) -> Iterator[BuiltRank]:
    """Builds one rank for each pipeline stage and expert, with its optimizer."""
    parallel = config.parallel
    # Weights and gradients have no device here; the kernels are those of any machine.
    built_as = replace(config, runtime=replace(config.runtime, device="cpu", kernels="torch"))
    ranks_of_stage = gpus // parallel.pipeline_model_parallel_size
    for stage in range(parallel.pipeline_model_parallel_size):
        for expert in range(parallel.expert_model_parallel_size):
            rank = stage * ranks_of_stage + expert * parallel.expert_tensor_size
            with meta_rank(parallel, rank, gpus) as groups:
                chunks = build_model(built_as, groups, torch.device("cpu"))
                session: Any = SimpleNamespace(groups=groups)
                optimizer = build_optimizer(built_as, wrap_ddp(built_as, session, chunks), session)
                named = {f"{n}.{name}": p for n, chunk in enumerate(chunks) for name, p in chunk.named_parameters()}
                yield BuiltRank(
                    stage=stage,
                    expert=expert,
                    sizes={name: parameter.numel() for name, parameter in named.items()},
                    num_trained=sum(p.numel() for p in named.values() if p.requires_grad),
                    num_groups=len(optimizer.param_groups),
                    optimizer_bytes=_optimizer_bytes(optimizer, built_as.precision.type == "bf16"),
                )


def _optimizer_bytes(optimizer: Any, has_master_weights: bool) -> int:
    """Moments, and under bf16 the FP32 weights that they update."""
    total = 0
    for chained in optimizer.chained_optimizers:
        if chained.is_stub_optimizer:
            continue
        tensors = [x for state in chained.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
        if has_master_weights:
            tensors += [x for group in chained.optimizer.param_groups for x in group["params"]]
        total += sum(x.numel() * x.element_size() for x in tensors)
    return total


def _data_lines(config: NaViLConfig) -> Iterator[str]:
    """The tokenizer and the sources, opened where they are here."""
    tokenizer = None
    if Path(config.data.tokenizer).exists():
        tokenizer = load_run_tokenizer(config)
        yield f"tokenizer {config.data.tokenizer} fits the model"
    else:
        yield f"NOT CHECKED: tokenizer {config.data.tokenizer} is not on this machine"
    for index in [*(source.index for source in config.data.train_sources), *config.evaluation.sources]:
        if not Path(index).exists():
            yield f"NOT CHECKED: source {index} is not on this machine"
        elif tokenizer is None:
            yield f"NOT CHECKED: source {index} is here, but not the tokenizer that it must have been built with"
        else:
            (source,) = open_sources([index], tokenizer, config.data.remote)
            source.check_shards()
            yield f"source {index}: {len(source.index):,} samples, all shards present"


def _memory_lines(config: NaViLConfig, gpus: int) -> Iterator[str]:
    hardware = Hardware(gpus=gpus)
    work = typical_workload(config, _TEXT_TOKENS, _IMAGE_SIDE)
    estimate = Estimator(config, hardware, work).estimate()
    yield from ("", "expected memory of a rank of each stage, in GB", *memory_lines(estimate))
    if estimate.fullest.peak <= hardware.usable_bytes:
        yield f"fits {hardware.hbm:g} GB"
    else:
        yield f"does NOT fit {hardware.hbm:g} GB: {what_is_too_large(estimate, hardware)}"
    side = f"{_IMAGE_SIDE} x {_IMAGE_SIDE}"
    yield f"(expected for rows of {side} images with {_TEXT_TOKENS} tokens of text; navil-megatron plan tells more)"
