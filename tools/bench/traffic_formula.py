"""What one rank sends in a training step, by arithmetic on host-known sizes: the counterpart of ``traffic_count``.

Holds for phase ``s2`` (everything trains) without recompute; another setting is refused rather than guessed.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from traffic_count import Traffic, TrafficTable

from navil_megatron.config.schema import NaViLConfig
from navil_megatron.data.types import Microbatch
from navil_megatron.layers.vision_plan import plan_vision

FP32, INT64 = 4, 8
PARAMETER_ALIGNMENT, BUFFER_ALIGNMENT = 64, 128
"""Numbers to which the distributed optimizer aligns each parameter, and each buffer as a whole."""

type Part = tuple[str, str, int, int]
"""Axis, collective, calls, bytes of all of them."""


@dataclass(frozen=True, slots=True)
class MicrobatchSizes:
    """What the formula needs of one microbatch."""

    num_predictions: int
    """Positions with loss."""
    gathered_features: int
    """Image tokens after the gather over tensor-parallel ranks: each share is padded to the largest."""
    rows_by_modality: tuple[int, int]
    """Text and visual rows."""


def sizes_of(microbatch: Microbatch, config: NaViLConfig) -> MicrobatchSizes:
    """Counted on the host."""
    ranks = config.parallel.tensor_model_parallel_size
    grids = [(int(t), int(h), int(w)) for t, h, w in microbatch.image_grid_thw]
    num_visual = int(np.count_nonzero(microbatch.visual_token_mask))
    return MicrobatchSizes(
        num_predictions=int(np.count_nonzero(microbatch.labels != -100)),
        gathered_features=ranks * plan_vision(grids, config.model.vision, 0, ranks).gathered_tokens,
        rows_by_modality=(microbatch.visual_token_mask.size - num_visual, num_visual),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankView:
    """All that the formula looks at."""

    config: NaViLConfig
    """The run."""
    pp_rank: int
    """Pipeline stage."""
    dp_rank: int
    """Replica."""
    world_size: int
    """Ranks of the run."""
    batch: Sequence[Sequence[MicrobatchSizes]]
    """The global batch: microbatches of each replica."""
    parameters: Sequence[Mapping[str, int]]
    """For each model chunk of this rank, how many numbers each trained parameter holds here."""

    @property
    def mine(self) -> Sequence[MicrobatchSizes]:
        """Microbatches of this replica."""
        return self.batch[self.dp_rank]

    @property
    def dp_size(self) -> int:
        """Replicas."""
        return len(self.batch)

    @property
    def num_layers(self) -> int:
        """Decoder layers of this stage."""
        parallel = self.config.parallel
        even = self.config.model.language.num_layers // parallel.pipeline_model_parallel_size
        of_chunks = parallel.pipeline_layers or ()
        stages = parallel.pipeline_model_parallel_size
        return sum(of_chunks[self.pp_rank :: stages]) if of_chunks else even

    @property
    def is_first(self) -> bool:
        """This stage embeds and encodes images."""
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """This stage computes the loss."""
        return self.pp_rank == self.config.parallel.pipeline_model_parallel_size - 1

    @property
    def number_bytes(self) -> int:
        """Bytes of a number of weights and activations."""
        return FP32 if self.config.training.precision == "fp32" else 2

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's hidden state."""
        return self.config.model.language.hidden_size * self.number_bytes

    @property
    def tokens_bytes(self) -> int:
        """Bytes of a microbatch's hidden states."""
        return self.config.microbatch_tokens * self.row_bytes


def traffic_by_formula(view: RankView) -> TrafficTable:
    """(axis, collective) -> calls and bytes of one step of this rank.

    Raises:
        SystemExit: The formula does not hold for the setting.
    """
    parallel, training = view.config.parallel, view.config.training
    if training.phase != "s2" or training.recompute != "none":
        raise SystemExit("the formula of the traffic holds for phase s2 without recompute")
    if parallel.expert_model_parallel_size > 1 and parallel.model_parallel_size > 1:
        raise SystemExit("the formula of the traffic knows expert parallelism beside data parallelism alone")
    found: TrafficTable = defaultdict(Traffic)
    for part in (tensor_parallel, tensor_parallel_gradients, pipeline, experts, data_parallel, gradient_norm):
        for axis, collective, calls, num_bytes in part(view):
            if calls:
                found[axis, collective] += Traffic(calls, num_bytes)
    return dict(found)


def tensor_parallel(view: RankView) -> Iterator[Part]:
    """Activations: t tokens of width h, in every layer; g image features; k predictions."""
    if view.config.parallel.tensor_model_parallel_size == 1:
        return
    split_rows = view.config.parallel.sequence_parallel
    for microbatch in view.mine:
        layers, tokens = view.num_layers, view.tokens_bytes
        if split_rows:
            # Two column layers gather, forward and again backward; two row layers gather their gradients.
            yield "tp", "all-gather", 6 * layers, 6 * layers * tokens
            # Two row layers scatter their sums; two column layers the sums of their gradients.
            yield "tp", "reduce-scatter", 4 * layers, 4 * layers * tokens
        else:
            # Outputs of two row layers, gradients of two column layers.
            yield "tp", "all-reduce", 4 * layers, 4 * layers * tokens
        if view.is_first:
            yield "tp", "all-reduce", 1, tokens  # the embedding table is split by vocabulary
            yield "tp", "all-gather", 1, microbatch.gathered_features * view.row_bytes
            if split_rows:
                yield "tp", "all-gather", 1, tokens  # gradient of the embeddings' rows
        if view.is_last:
            if split_rows:
                yield "tp", "all-gather", 1, tokens  # rows for the head
            yield "tp", "all-reduce", 1, microbatch.num_predictions * view.row_bytes  # the head's input gradient
            # Cross entropy over a split vocabulary: maximum, label's logit, sum of exponentials.
            yield "tp", "all-reduce", 3, 3 * microbatch.num_predictions * FP32


def tensor_parallel_gradients(view: RankView) -> Iterator[Part]:
    """Weights that every rank of a tensor-parallel group holds whole but used on other rows, heads or images."""
    parallel = view.config.parallel
    if parallel.tensor_model_parallel_size == 1:
        return
    parameters = [item for chunk in view.parameters for item in chunk.items()]
    by_heads = ("q_layernorm", "k_layernorm")
    by_rows = ("input_layernorm", "pre_mlp_layernorm", "final_layernorm")
    if view.config.model.language.composed_visual_output_projection:
        by_rows += ("linear_proj.visual",)
    words = (*by_heads, *by_rows) if parallel.sequence_parallel else by_heads
    summed = sum(n for name, n in parameters if any(word in name for word in words))
    yield "tp", "all-reduce", int(summed > 0), summed * FP32  # core sends them as one
    images = [n for name, n in parameters if name.startswith(("vision_encoder.", "connector."))]
    yield "tp", "all-reduce", len(images), sum(images) * FP32


def pipeline(view: RankView) -> Iterator[Part]:
    """Each chunk sends its activations on and its gradient back, but for the first and the last of all."""
    parallel = view.config.parallel
    if parallel.pipeline_model_parallel_size == 1:
        return
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    sends = len(view.mine) * (2 * chunks - view.is_first - view.is_last)
    shares = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    yield "pp", "send", sends, sends * view.tokens_bytes // shares
    if view.config.model.language.tied_embeddings and (view.is_first or view.is_last):
        language = view.config.model.language
        numbers = language.vocab_size * language.hidden_size // parallel.tensor_model_parallel_size
        yield "embd", "all-reduce", 1, numbers * FP32


def experts(view: RankView) -> Iterator[Part]:
    """Rows to the rank of their expert and back, forward and backward."""
    ranks = view.config.parallel.expert_model_parallel_size
    if ranks == 1:
        return
    first = view.dp_rank - view.dp_rank % ranks
    modality = view.dp_rank % ranks
    for number in range(len(view.mine)):
        arriving = sum(view.batch[rank][number].rows_by_modality[modality] for rank in range(first, first + ranks))
        layers = view.num_layers
        # Each rank tells how many rows go to which of the experts.
        yield "ep", "all-gather", layers, layers * ranks * ranks * INT64
        # Own rows out (forward) and their output's gradient out (backward); core sends each row's probability along.
        yield (
            "ep",
            "all-to-all",
            3 * layers,
            layers * (2 * view.tokens_bytes + view.tokens_bytes // view.row_bytes * view.number_bytes),
        )
        # The expert's rows back: their output (forward), their gradient (backward).
        yield "ep", "all-to-all", 2 * layers, layers * 2 * arriving * view.row_bytes


def data_parallel(view: RankView) -> Iterator[Part]:
    """Gradients, in FP32; with the distributed optimizer the updated weights too. And the batch's loss weight."""
    expert_ranks = view.config.parallel.expert_model_parallel_size
    if view.dp_size > 1:
        yield "dp", "all-reduce", 1, FP32
    is_split = view.config.optimizer.distributed
    for chunk in view.parameters:
        of_experts = [n for name, n in chunk.items() if expert_ranks > 1 and ".mlp." in name]
        shared = [n for name, n in chunk.items() if expert_ranks == 1 or ".mlp." not in name]
        for axis, numbers, ranks in (
            ("dp", shared, view.dp_size),
            ("expert dp", of_experts, view.dp_size // expert_ranks),
        ):
            if ranks == 1 or not numbers:
                continue
            if not is_split:
                yield axis, "all-reduce", 1, sum(numbers) * FP32
                continue
            yield axis, "reduce-scatter", 1, buffer_size(numbers, ranks) * FP32
            yield axis, "all-gather", 1, buffer_size(numbers, ranks) * view.number_bytes


def buffer_size(numbers: Sequence[int], ranks: int) -> int:
    """Numbers in the distributed optimizer's buffer of these parameters, padding included."""
    aligned = sum(_round_up(n, PARAMETER_ALIGNMENT) for n in numbers)
    return _round_up(aligned, math.lcm(ranks, BUFFER_ALIGNMENT))


def gradient_norm(view: RankView) -> Iterator[Part]:
    """One number, summed over the ranks that hold different gradients."""
    parallel = view.config.parallel
    if view.config.optimizer.distributed:
        yield "world", "all-reduce", int(view.world_size > 1), FP32
        return
    replica = parallel.model_parallel_size
    yield "replica", "all-reduce", int(replica > 1), FP32
    if parallel.expert_model_parallel_size > 1:
        yield "replica", "all-reduce", 1, FP32  # the experts' own


def state_bytes(view: RankView) -> int:
    """Bytes of weights, FP32 gradients and Adam's two moments of this rank; FP32 master weights under bf16 too."""
    expert_ranks, is_split = view.config.parallel.expert_model_parallel_size, view.config.optimizer.distributed
    optimizer_bytes = 2 * FP32 + (FP32 if view.number_bytes == 2 else 0)
    total = 0.0
    for chunk in view.parameters:
        for name, numbers in chunk.items():
            ranks = view.dp_size // (expert_ranks if ".mlp." in name else 1) if is_split else 1
            total += numbers * (view.number_bytes + FP32 + optimizer_bytes / ranks)
    return round(total)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
