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
from navil_megatron.planner.machine import Machine

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
    """The run with this layout."""
    estimate: Estimate | None
    """None where the config is refused."""
    fits: bool
    """It can be started on this machine."""
    reason: str
    """Why it stands where it stands."""


def search_layouts(config: NaViLConfig, machine: Machine, work: Workload) -> list[Candidate]:
    """Layouts that fit, fastest first; then those that take too much memory; then those that a rule refuses."""
    estimator = Estimator(machine, work)
    fitting: list[Candidate] = []
    too_large: list[Candidate] = []
    refused: list[Candidate] = []
    for wished in layouts_of(config, machine):
        try:
            # Refused before it is balanced: the rules keep sizes apart that do not divide.
            balanced = estimator.balance(wished) if wished.parallel.pipeline_model_parallel_size > 1 else wished
            validate(balanced, machine.gpus)
        except ConfigError as error:
            refused.append(Candidate(config=wished, estimate=None, fits=False, reason=error.problems[0]))
            continue
        estimate = estimator.estimate(balanced)
        fits = estimate.fullest.peak <= machine.usable_bytes
        reason = where_time_goes(estimate) if fits else what_is_too_large(estimate, machine)
        candidate = Candidate(config=balanced, estimate=estimate, fits=fits, reason=reason)
        (fitting if fits else too_large).append(candidate)
    fitting.sort(key=lambda found: (found.estimate.step_seconds, found.estimate.fullest.peak) if found.estimate else ())
    too_large.sort(key=lambda found: found.estimate.fullest.peak if found.estimate else 0)
    return [*fitting, *too_large, *refused]


def layouts_of(config: NaViLConfig, machine: Machine) -> Iterator[NaViLConfig]:
    """The run with every layout that its GPUs could hold; tensor and context parallelism stay inside a node. Rows of
    some length are needed before splitting them pays.
    """
    contexts = (1, 2, 4, 8) if config.data.seq_length > SPLIT_ROWS_BEYOND else (1,)
    tensors = [n for n in _powers_of_two(machine.gpus) if n <= machine.gpus_per_node]
    stages = [n for n in range(1, machine.gpus + 1) if machine.gpus % n == 0 and n <= config.model.language.num_layers]
    all_experts = len(MODALITIES) * config.model.language.num_experts
    expert_ranks = [n for n in range(1, all_experts + 1) if all_experts % n == 0]
    for tensor, context, pipeline, experts, (recompute, modules) in product(
        tensors, contexts, stages, expert_ranks, RECOMPUTE
    ):
        if machine.gpus % (tensor * context * pipeline) or tensor * context > machine.gpus_per_node:
            continue
        replicas = machine.gpus // (tensor * context * pipeline)
        if (
            experts > replicas * context
            or config.training.global_batch_size < replicas * config.training.micro_batch_size
        ):
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
    found = [
        f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share >= 0.005
    ]
    training = estimate.config.training
    if training.recompute != "none":
        parts = "every layer" if training.recompute == "full" else " and ".join(training.recompute_modules)
        found.append(f"recomputes {parts}")
    return ", ".join(found) or "nothing but compute"


def what_is_too_large(estimate: Estimate, machine: Machine) -> str:
    """What the fullest rank takes, and which kinds most of it."""
    fullest = estimate.fullest
    kinds = sorted(MEMORY_KINDS, key=lambda kind: -getattr(fullest, kind))[:3]
    parts = ", ".join(f"{kind} {getattr(fullest, kind) / 1e9:.1f}" for kind in kinds)
    return (
        f"stage {fullest.stage} takes {fullest.peak / 1e9:.1f} of {machine.usable_bytes / 1e9:.1f} usable GB "
        f"(most of it: {parts})"
    )


def _powers_of_two(limit: int) -> list[int]:
    return [2**n for n in range(limit.bit_length()) if 2**n <= limit]
