"""``navil-megatron train --dry-run --step``: a whole step of each pipeline stage at full size, without a GPU.

The step is that of a run, on a GPU that is not there (``runtime.fake_rank``). It stops where the host would wait for
the device, or a tensor is on the wrong one; what it held and multiplied stands beside what the planner expects.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from navil_megatron.blueprint.experts_placement import local_experts
from navil_megatron.blueprint.flops import backward_flops, encoding_cost, forward_flops
from navil_megatron.blueprint.held_parameters import layers_of_chunks
from navil_megatron.blueprint.image_plan import num_patches
from navil_megatron.blueprint.modality_order import ModalityOrder
from navil_megatron.blueprint.vision_plan import assign_images, fullest_share
from navil_megatron.blueprint.workload import Workload, expert_loads, typical_workload
from navil_megatron.config.errors import UserError
from navil_megatron.config.modality import MODALITIES
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.typical import typical_microbatch
from navil_megatron.models.build import build_model
from navil_megatron.planner.estimate import Estimator, StageMemory
from navil_megatron.planner.hardware import Hardware
from navil_megatron.runtime.fake_rank import fake_rank
from navil_megatron.runtime.flop_count import FlopCount
from navil_megatron.runtime.host_waits import AllowedWait, watching
from navil_megatron.runtime.known_values import gather_alike
from navil_megatron.runtime.live_bytes import LiveBytes
from navil_megatron.training.batch import place_of
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import Chunks, train_step

OLDEST_TORCH = "2.14"
"""Before, fake tensors do not know all kernels of a step in BF16."""
_CAUSAL_PAIRS = 2
"""Pairs of tokens in a causal segment, all of which torch counts, over those that attend."""
_SOFTMAX_BACKWARD = 2.5
"""Products of attention's backward pass over those of its forward pass, as torch counts: the scores are made again."""


class Flops(NamedTuple):
    """Of a rank's step."""

    products: float  # with weights
    attention: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SteppedRank:
    """What the step of one rank held and did."""

    stage: int
    rank: int
    num_microbatches: int
    weights: int  # bytes, as all that follows
    gradients: int
    optimizer: int
    peak: int
    largest: Counter[str]
    """Bytes at the peak, by the line that made them."""
    expected: StageMemory
    flops: Flops
    expected_flops: Flops
    waits: frozenset[AllowedWait]
    """Where the host waited for the device."""
    seconds: float  # on this machine


def dry_step(config: NaViLConfig, gpus: int, text_tokens: int, image_side: int) -> Iterator[str]:
    """Takes the steps and tells of them, line by line.

    Raises:
        UserError, DeviceError: As ``step_ranks``.
    """
    found = list(step_ranks(config, gpus, text_tokens, image_side))
    yield f"a step of the fullest rank of each stage with {found[0].num_microbatches} microbatches, without a GPU"
    if config.runtime.kernels != "torch" or config.precision.fp8 != "none":
        yield "in BF16 by torch's kernels: those of the config need a GPU"
    yield ""
    yield "memory in GB: what the tensors of the step held, and what is expected"
    yield _row("stage", "rank", "weights", "gradients", "optimizer", "step", "peak", "expected", "off")
    for step in found:
        of_step = step.peak - step.weights - step.gradients - step.optimizer
        held = (step.weights, step.gradients, step.optimizer, of_step, step.peak, step.expected.peak)
        gigabytes = (f"{num_bytes / 1e9:.2f}" for num_bytes in held)
        yield _row(step.stage, step.rank, *gigabytes, _off(step.expected.peak, step.peak))
    yield ""
    yield "10^12 FLOPs: torch's formulas over what the step multiplied, and what is expected"
    yield _row("stage", "products", "expected", "off", "attention", "expected", "off", "took")
    for step in found:
        pairs = zip(step.flops, step.expected_flops, strict=True)
        cells = ((f"{counted / 1e12:.2f}", f"{ours / 1e12:.2f}", _off(ours, counted)) for counted, ours in pairs)
        yield _row(step.stage, *chain.from_iterable(cells), f"{step.seconds:.0f} s")
    yield ""
    yield "no tensor is on the wrong device, and the host waits for the device nowhere but for"
    waits = {wait for step in found for wait in step.waits}
    yield from (f"  {wait.reason} ({wait.path}, {wait.function})" for wait in sorted(waits))


def step_ranks(config: NaViLConfig, gpus: int, text_tokens: int, image_side: int) -> Iterator[SteppedRank]:
    """A step of the fullest rank of each stage, with as many microbatches as fill the pipeline; each holds samples of
    one square image, its side in pixels, and so many tokens of text.

    Raises:
        UserError: No step can be taken with this torch, or in this precision.
        DeviceError: The host would wait for the device, or a tensor is on the wrong one of the two.
    """
    if torch.__version__ < OLDEST_TORCH:
        raise UserError(f"--step needs torch {OLDEST_TORCH} or newer, found {torch.__version__}; install a newer one")
    if config.precision.type != "bf16":
        raise UserError(f'--step takes a step in BF16; set precision.type = "bf16", found "{config.precision.type}"')
    runtime = replace(config.runtime, device="cuda", kernels="torch", gradient_accumulation_fusion="none")
    config = replace(config, runtime=runtime, precision=replace(config.precision, fp8="none"))
    for stage in range(config.parallel.pipeline_model_parallel_size):
        rank = _fullest_rank(config, gpus, stage, typical_workload(config, text_tokens, image_side))
        yield _step(config, gpus, stage, rank, text_tokens, image_side)


def _step(config: NaViLConfig, gpus: int, stage: int, rank: int, text_tokens: int, image_side: int) -> SteppedRank:
    start, memory, flops, rows = time.monotonic(), LiveBytes(), FlopCount(), _RowsOfExperts(config)
    with fake_rank(config.parallel, rank, gpus, (memory, flops), rows) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        optimizer = build_optimizer(config, chunks, session)
        microbatch = typical_microbatch(config, place_of(session), text_tokens, image_side)
        rows.order = microbatch.modality_order
        estimator = Estimator(config, Hardware(gpus=gpus), microbatch.padded_workload)
        estimate = estimator.estimate()
        num_microbatches = min(estimate.num_microbatches, _filling_the_pipeline(config))
        state, weights, gradients = memory.now, memory.of(_weights(chunks)), memory.of(_gradients(chunks))
        memory.forget_peak()
        with watching() as waits:
            train_step(config, session, chunks, optimizer, [microbatch] * num_microbatches, lr=config.optimizer.lr)
        return SteppedRank(
            stage=stage,
            rank=rank,
            num_microbatches=num_microbatches,
            weights=weights,
            gradients=gradients,
            optimizer=state - weights - gradients,
            peak=memory.peak,
            largest=memory.at_peak(),
            expected=estimate.stages[stage],
            flops=Flops(flops.products, flops.attention),
            expected_flops=_expected_flops(estimator, stage, num_microbatches),
            waits=frozenset(waits),
            seconds=time.monotonic() - start,
        )


class _RowsOfExperts:
    """What ranks that share experts tell one another: how many rows they have for each."""

    def __init__(self, config: NaViLConfig) -> None:
        parallel, self._language = config.parallel, config.model.language
        self._tensor, self._ranks = parallel.sequence_ranks, parallel.expert_model_parallel_size
        self.order: ModalityOrder | None = None

    def __call__(self, own: Tensor, num_ranks: int) -> Tensor:
        """One rank's after the other; tensor-parallel ranks count fastest, and hold rows of the two modalities as the
        plan lays them.
        """
        num_experts, chosen = self._language.num_experts, self._language.experts_per_token
        if self.order is None or own.numel() != num_experts * len(MODALITIES):
            return gather_alike(own, num_ranks)
        of_ranks = [local_experts(rank, self._ranks, num_experts) for rank in range(self._ranks)]
        columns = [modality for held in of_ranks for modality, numbers in held.items() for _ in numbers]
        share, found = self.order.rows.size // self._tensor, []
        for member in range(num_ranks):
            num_text = min(max(self.order.num_text_tokens - member % self._tensor * share, 0), share)
            rows = dict(zip(MODALITIES, (num_text, share - num_text), strict=True))
            found += [rows[modality] * chosen // num_experts for modality in columns]
        return torch.tensor(found)


def _fullest_rank(config: NaViLConfig, gpus: int, stage: int, work: Workload) -> int:
    """The first of those that hold the experts with most tokens and, of these, encode most patches."""
    parallel, vision = config.parallel, config.model.vision
    loads, patches = expert_loads(work, config), [0] * parallel.row_ranks
    owners = assign_images([encoding_cost(grid, vision) for grid in work.grids], parallel.row_ranks)
    for grid, owner in zip(work.grids, owners, strict=True):
        patches[owner] += num_patches([grid])

    def fullness(rank: int) -> tuple[float, int]:
        return loads[rank // parallel.expert_tensor_size % len(loads)], patches[rank % parallel.row_ranks]

    ranks_of_stage = gpus // parallel.pipeline_model_parallel_size
    return stage * ranks_of_stage + max(range(ranks_of_stage), key=fullness)


def _filling_the_pipeline(config: NaViLConfig) -> int:
    """Microbatches of a step that holds as much as one with more."""
    stages = config.parallel.pipeline_model_parallel_size
    return stages + 1 if config.parallel.virtual_pipeline_model_parallel_size is None else 2 * stages


def _weights(chunks: Chunks) -> Iterator[Tensor]:
    for chunk in chunks:
        yield from (*chunk.module.parameters(), *chunk.module.buffers())


def _gradients(chunks: Chunks) -> Iterator[Tensor]:
    for chunk in chunks:
        yield from (buffer.grad_data for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers))


def _expected_flops(estimator: Estimator, stage: int, num_microbatches: int) -> Flops:
    """Of a rank's step, with attention as torch counts it."""
    parallel, phase = estimator.config.parallel, estimator.config.training.phase
    stages = parallel.pipeline_model_parallel_size
    num_layers = sum(layers_of_chunks(parallel, estimator.config.model.language.num_layers)[stage::stages])
    layer, encoder, head = estimator.products()
    parts = [(layer, num_layers, _CAUSAL_PAIRS)]
    parts += [(encoder, 1, 1)] if stage == 0 else []
    parts += [(head, 1, 1)] if stage == stages - 1 else []
    products = attention = 0.0
    for part, times, pairs in parts:
        weighted = [term for term in part.terms if term[0] is not None]
        of_weights = forward_flops(weighted) + backward_flops(weighted, phase)
        of_weights += forward_flops(term for term in part.again if term[0] is not None)
        softmax = forward_flops(term for term in part.terms if term[0] is None) * (1 + _SOFTMAX_BACKWARD)
        softmax += forward_flops(term for term in part.again if term[0] is None)
        products += times * num_microbatches * of_weights / part.ranks
        attention += times * num_microbatches * softmax * pairs / part.ranks
    if stage == 0:  # pixels want no gradient, and their embedding is not computed again
        vision, again = estimator.config.model.vision, estimator.config.training.recomputes("encoder")
        patches = num_patches(fullest_share(estimator.work.grids, vision, parallel.row_ranks))
        products -= (1 + again) * num_microbatches * patches * 2 * vision.patch_dim * vision.hidden_size
    return Flops(products, attention)


def _off(expected: float, found: float) -> str:
    return f"{expected / found - 1:+.1%}" if found else "-"


def _row(*cells: object) -> str:
    return "".join(f"{cell:>11}" for cell in cells)
