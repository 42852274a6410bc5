"""Every layout of a run on some GPUs: which fit, how fast each is expected to be, and why the others are out."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from navil_megatron.blueprint.workload import Workload
from navil_megatron.config.errors import ConfigError
from navil_megatron.config.modality import MODALITIES
from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.training import Recomputed
from navil_megatron.config.validate import validate
from navil_megatron.planner.estimate import MEMORY_KINDS, Estimate, Estimator
from navil_megatron.planner.hardware import Hardware

RECOMPUTE: tuple[tuple[Literal["none", "selective", "full"], tuple[Recomputed, ...]], ...] = (
    ("none", ("attention",)),
    ("selective", ("encoder",)),
    ("selective", ("mlp", "encoder")),
    ("full", ("attention",)),
)

SPLIT_ROWS_BEYOND = 16_384
"""Tokens of a row beyond which context parallelism is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One layout and the verdict on it."""

    config: NaViLConfig
    estimate: Estimate | None  # none where the config is refused
    fits: bool
    reason: str  # why it stands where it stands


def search_layouts(config: NaViLConfig, hardware: Hardware, work: Workload) -> list[Candidate]:
    """Layouts that fit, fastest first; then those that take too much memory; then those that a rule refuses."""
    found = []
    for wished in layouts_of(config, hardware):
        try:
            is_piped = wished.parallel.pipeline_model_parallel_size > 1
            balanced = Estimator(wished, hardware, work).balanced() if is_piped else wished
            validate(balanced, hardware.gpus)
        except ConfigError as error:
            found.append(Candidate(config=wished, estimate=None, fits=False, reason=error.problems[0]))
            continue
        estimate = Estimator(balanced, hardware, work).estimate()
        fits = estimate.fullest.peak <= hardware.usable_bytes
        reason = where_time_goes(estimate) if fits else what_is_too_large(estimate, hardware)
        found.append(Candidate(config=balanced, estimate=estimate, fits=fits, reason=reason))
    return sorted(found, key=_rank)


def _rank(candidate: Candidate) -> tuple[float, ...]:
    if candidate.estimate is None:
        return (2,)
    peak = candidate.estimate.fullest.peak
    return (0, candidate.estimate.step_seconds, peak) if candidate.fits else (1, peak)


def layouts_of(config: NaViLConfig, hardware: Hardware) -> Iterator[NaViLConfig]:
    """The run with every layout that its GPUs could hold; tensor and context parallelism stay inside a node. Rows of
    some length are needed before splitting them pays.
    """
    contexts = (1, 2, 4, 8) if config.data.seq_length > SPLIT_ROWS_BEYOND else (1,)
    tensors = [2**n for n in range(16) if 2**n <= min(hardware.gpus, hardware.gpus_per_node)]
    stages = [
        n for n in range(1, hardware.gpus + 1) if hardware.gpus % n == 0 and n <= config.model.language.num_layers
    ]
    all_experts = len(MODALITIES) * config.model.language.num_experts
    expert_ranks = [n for n in range(1, all_experts + 1) if all_experts % n == 0]
    for tensor, context, pipeline, experts, (recompute, modules) in product(
        tensors, contexts, stages, expert_ranks, RECOMPUTE
    ):
        if hardware.gpus % (tensor * context * pipeline) or tensor * context > hardware.gpus_per_node:
            continue
        replicas = hardware.gpus // (tensor * context * pipeline)
        smallest_batch = replicas * config.training.micro_batch_size
        if experts > replicas * context or config.training.global_batch_size < smallest_batch:
            continue
        routed = config.model.language.num_experts > 1
        for virtual, sequence, split in product(
            (None, 2) if pipeline > 1 else (None,),
            (True, False) if tensor > 1 else (False,),
            (None, 1) if tensor > 1 and routed else (None,),
        ):
            if virtual and config.model.language.num_layers < pipeline * virtual:
                continue
            parallel = ParallelConfig(
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                virtual_pipeline_model_parallel_size=virtual,
                context_parallel_size=context,
                expert_model_parallel_size=experts,
                expert_tensor_parallel_size=split,
                sequence_parallel=sequence,
            )
            training = replace(config.training, recompute=recompute, recompute_modules=modules)
            yield replace(config, parallel=parallel, training=training)


def where_time_goes(estimate: Estimate) -> str:
    """The shares of a step that are not useful work, largest first."""
    total = estimate.step_seconds
    shares = {
        "stages idle": estimate.schedule.bubble * estimate.schedule.seconds / total,
        "collectives in the layers": estimate.layer_traffic_seconds / total,
        "gradients and weights": estimate.gradient_seconds / total,
        "the update": estimate.update_seconds / total,
    }
    largest_first = sorted(shares.items(), key=lambda item: -item[1])
    found = [f"{name} {share:.0%}" for name, share in largest_first if share >= 0.005]
    training = estimate.config.training
    if training.recompute != "none":
        parts = "every layer" if training.recompute == "full" else " and ".join(training.recompute_modules)
        found.append(f"recomputes {parts}")
    return ", ".join(found) or "nothing but compute"


def what_is_too_large(estimate: Estimate, hardware: Hardware) -> str:
    """What the fullest rank takes, and which kinds most of it."""
    fullest = estimate.fullest
    kinds = sorted(MEMORY_KINDS, key=lambda kind: -getattr(fullest, kind))[:3]
    parts = ", ".join(f"{kind} {getattr(fullest, kind) / 1e9:.1f}" for kind in kinds)
    return (
        f"stage {fullest.stage} takes {fullest.peak / 1e9:.1f} of {hardware.usable_bytes / 1e9:.1f} usable GB "
        f"(most of it: {parts})"
    )
