"""What one rank sends in a training step, by arithmetic on host-known sizes.

``tools/bench/layouts.py`` counts the bytes of real steps and holds them against this formula. It is exact where
``is_exact`` says so; elsewhere it is an estimate: frozen parameters may save a collective of input gradients.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from navil_megatron.blueprint.experts_placement import local_experts
from navil_megatron.blueprint.held_parameters import HeldParameter, expert_replicas, is_routed, layers_of_chunks
from navil_megatron.blueprint.parameters import EMBEDDING, parameters_by_key
from navil_megatron.config.modality import MODALITIES
from navil_megatron.config.run import NaViLConfig
from navil_megatron.planner.memory import FP32, INT64

PARAMETER_ALIGNMENT, BUFFER_ALIGNMENT = 64, 128
"""Numbers to which the distributed optimizer aligns each parameter, and each buffer as a whole."""

type Sent = tuple[str, str, int, int]
"""Axis, collective, calls, bytes of all of them."""


class Traffic(NamedTuple):
    """How often, and how much in all."""

    calls: int = 0
    num_bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":  # type: ignore[override]
        return Traffic(self.calls + other.calls, self.num_bytes + other.num_bytes)


type TrafficTable = dict[tuple[str, str], Traffic]
"""(axis, collective) -> traffic."""


@dataclass(frozen=True, slots=True)
class MicrobatchSizes:
    """What the formula needs of one microbatch."""

    num_predictions: int
    """Positions with loss."""
    gathered_features: int
    """Image tokens after the gather over the ranks that share a row: each share is padded to the largest."""
    rows_by_modality: tuple[int, int]
    """Text and visual rows."""


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
    parameters: Sequence[Sequence[HeldParameter]]
    """Those that train, of each model chunk of this rank."""

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
        layers = layers_of_chunks(self.config.parallel, self.config.model.language.num_layers)
        return sum(layers[self.pp_rank :: self.config.parallel.pipeline_model_parallel_size])

    @property
    def is_first(self) -> bool:
        """This stage embeds and encodes images."""
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """This stage computes the loss."""
        return self.pp_rank == self.config.parallel.pipeline_model_parallel_size - 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's hidden state."""
        return self.config.model.language.hidden_size * self.config.precision.number_bytes

    @property
    def tokens_bytes(self) -> int:
        """Bytes of a microbatch's hidden states on a context-parallel rank."""
        return self.config.rank_tokens * self.row_bytes


def is_exact(config: NaViLConfig) -> bool:
    """Whether the counted bytes equal the formula's: everything trains, experts stand beside data parallelism, and no
    context-parallel rank needs to say how many predictions it drew.
    """
    parallel = config.parallel
    is_plain = not is_routed(config.model, parallel) or parallel.model_parallel_size == 1
    is_plain &= parallel.context_parallel_size == 1 or parallel.tensor_model_parallel_size == 1
    # Where learned routers send rows, and so how many arrive, is not known before.
    is_known = config.model.language.num_experts == 1 or parallel.expert_model_parallel_size == 1
    return config.training.phase == "s2" and is_plain and is_known


def traffic_of_step(view: RankView) -> TrafficTable:
    """(axis, collective) -> calls and bytes of one step of this rank."""
    in_layers = (sent for number in range(len(view.mine)) for sent in layer_traffic(view, number))
    around = (sent for microbatch in view.mine for sent in edge_traffic(view, microbatch))
    found: TrafficTable = defaultdict(Traffic)
    for axis, collective, calls, num_bytes in chain(
        ((axis, word, calls * view.num_layers, size * view.num_layers) for axis, word, calls, size in in_layers),
        around,
        _pipeline(view),
        gradient_traffic(view),
        _gradient_norm(view),
    ):
        if calls:
            found[axis, collective] += Traffic(calls, num_bytes)
    return dict(found)


def layer_traffic(view: RankView, number: int) -> Iterator[Sent]:
    """Collectives of one decoder layer and of one microbatch of the replica, forward and backward."""
    parallel = view.config.parallel
    if parallel.tensor_model_parallel_size > 1:
        routed = is_routed(view.config.model, parallel)
        yield from (_routed_tensor_layer if routed else _tensor_layer)(view.config, view.tokens_bytes)
    if parallel.context_parallel_size > 1:
        yield from _context_layer(view.config)
    if parallel.expert_model_parallel_size > 1:
        yield from _expert_layer(view, number)


def edge_traffic(view: RankView, microbatch: MicrobatchSizes) -> Iterator[Sent]:
    """Collectives around the layers: embeddings and images before them, the head behind."""
    parallel = view.config.parallel
    if parallel.tensor_model_parallel_size > 1:
        yield from _tensor_edges(view, microbatch)
    if parallel.context_parallel_size > 1 and view.is_first:
        # Features of all ranks' images, and the gradients of this rank's summed over the ranks that used them.
        gathered = microbatch.gathered_features * view.row_bytes
        yield "cp", "all-gather", 1, gathered
        yield "cp", "reduce-scatter", 1, gathered // parallel.tensor_model_parallel_size


def gradient_traffic(view: RankView) -> Iterator[Sent]:
    """Gradients and updated weights, over the ranks that share them."""
    yield from _data_parallel(view)
    if view.config.parallel.tensor_model_parallel_size > 1:
        yield from _tensor_gradients(view)


def _tensor_layer(config: NaViLConfig, tokens_bytes: int) -> Iterator[Sent]:
    # A part that is computed again repeats the forward collectives of its column and its row layer.
    again = (config.training.recompute == "full") + config.training.recomputes("mlp")
    # Attention and feed-forward are a column and a row layer each.
    if config.parallel.sequence_parallel:
        # Each column layer gathers, forward and again backward; each row layer gathers its gradient.
        yield "tp", "all-gather", 6 + again, (6 + again) * tokens_bytes
        # Each row layer scatters its sum; each column layer the sum of its gradients.
        yield "tp", "reduce-scatter", 4 + again, (4 + again) * tokens_bytes
    else:
        # Outputs of the row layers, gradients of the column layers.
        yield "tp", "all-reduce", 4 + again, (4 + again) * tokens_bytes


def _routed_tensor_layer(config: NaViLConfig, tokens_bytes: int) -> Iterator[Sent]:
    """The same under sequence parallelism where rows are sent, or sorted, to their experts; routers are left out."""
    again = config.training.recompute == "full"
    yield "tp", "all-gather", 3 + again, (3 + again) * tokens_bytes
    yield "tp", "reduce-scatter", 2 + again, (2 + again) * tokens_bytes
    if config.parallel.expert_tensor_size == 1:
        return
    # Rows are gathered and outputs scattered, and gradients the other way: of those that all-to-all has brought, or
    # without expert parallelism of the tokens themselves.
    is_sent = config.parallel.expert_model_parallel_size > 1
    rows_bytes = tokens_bytes * (config.model.language.experts_per_token if is_sent else 1)
    again = config.training.recomputes("mlp")
    yield "tp", "all-gather", 2 + again, (2 + again) * rows_bytes
    yield "tp", "reduce-scatter", 2 + again, (2 + again) * rows_bytes


def _tensor_edges(view: RankView, microbatch: MicrobatchSizes) -> Iterator[Sent]:
    split_rows, tokens = view.config.parallel.sequence_parallel, view.tokens_bytes
    if view.is_first:
        yield "tp", "all-reduce", 1, tokens  # the embedding table is split by vocabulary
        if view.config.parallel.context_parallel_size == 1:
            yield "tp", "all-gather", 1, microbatch.gathered_features * view.row_bytes
        if split_rows:
            yield "tp", "all-gather", 1, tokens  # gradient of the embeddings' rows
    if view.is_last:
        if split_rows:
            yield "tp", "all-gather", 1, tokens  # rows for the head
        # The head's input gradient, one chunk of positions after the other.
        num_chunks = math.ceil(microbatch.num_predictions / view.config.training.loss_chunk_tokens)
        yield "tp", "all-reduce", num_chunks, microbatch.num_predictions * view.row_bytes
        # Cross entropy over a split vocabulary: maximum; then label's logit and sum of exponentials together.
        yield "tp", "all-reduce", 2, 3 * microbatch.num_predictions * FP32


def _tensor_gradients(view: RankView) -> Iterator[Sent]:
    """Weights that every rank of a tensor-parallel group holds whole but used on other rows, heads or images."""
    held = [piece for chunk in view.parameters for piece in chunk]
    kinds = ("heads", "rows") if view.config.parallel.sequence_parallel else ("heads",)
    summed = sum(piece.numel for piece in held if piece.parameter.used_on in kinds)
    yield "tp", "all-reduce", int(summed > 0), summed * FP32  # core sends them as one
    images = [piece.numel for piece in held if piece.parameter.used_on == "images"]
    yield "tp", "all-reduce", len(images), sum(images) * FP32


def _context_layer(config: NaViLConfig) -> Iterator[Sent]:
    """Query, key and value one way, the softmax's output the other, and both again for their gradients."""
    language, training, tensor = config.model.language, config.training, config.parallel.tensor_model_parallel_size
    head = config.rank_tokens * language.head_dim * config.precision.number_bytes // tensor
    there = (language.num_attention_heads + 2 * language.num_query_groups) * head
    back = language.num_attention_heads * head
    # A part that is computed again stops where its last saved tensor is: the softmax's output is not sent again.
    yield "cp", "all-to-all", 2 + training.recomputes("attention"), (2 + training.recomputes("attention")) * there
    yield "cp", "all-to-all", 2 + (training.recompute == "full"), (2 + (training.recompute == "full")) * back


def _pipeline(view: RankView) -> Iterator[Sent]:
    """Each chunk sends its activations on and its gradient back, but for the first and the last of all."""
    parallel = view.config.parallel
    if parallel.pipeline_model_parallel_size == 1:
        return
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    sends = len(view.mine) * (2 * chunks - view.is_first - view.is_last)
    shares = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    yield "pp", "send", sends, sends * view.tokens_bytes // shares
    if view.config.model.language.tied_embeddings and (view.is_first or view.is_last):
        table = parameters_by_key(view.config.model)[EMBEDDING]
        yield "embd", "all-reduce", 1, table.numel // parallel.tensor_model_parallel_size * FP32


def _expert_layer(view: RankView, number: int) -> Iterator[Sent]:
    """Rows to the rank of their expert and back, forward and backward."""
    ranks, language = view.config.parallel.expert_model_parallel_size, view.config.model.language
    shares = view.config.parallel.tensor_model_parallel_size if view.config.parallel.sequence_parallel else 1
    first, times = view.dp_rank - view.dp_rank % ranks, language.experts_per_token
    held = local_experts(view.dp_rank % ranks, ranks, language.num_experts)
    # Context-parallel ranks of a replica hold equally many rows of each modality.
    context = view.config.parallel.context_parallel_size
    rows_of_ranks = [replica[number].rows_by_modality for replica in view.batch for _ in range(context)]
    senders = [rows_of_ranks[rank % len(rows_of_ranks)] for rank in range(first, first + ranks)]
    # Routers being even; of one expert per modality it is so.
    arriving = times * sum(
        rows[MODALITIES.index(modality)] * len(numbers) // language.num_experts
        for rows in senders
        for modality, numbers in held.items()
    )
    # Each rank tells how many rows go to which of the experts.
    yield "ep", "all-gather", 1, ranks * len(MODALITIES) * language.num_experts * INT64
    # Own rows out (forward) and their output's gradient out (backward); core sends each row's probability along, and
    # gets a learned one's gradient back.
    probabilities = view.config.rank_tokens * view.config.precision.number_bytes
    learned = language.num_experts > 1
    yield "ep", "all-to-all", 3, times * (2 * view.tokens_bytes + probabilities) // shares
    if learned:
        yield "ep", "all-to-all", 1, arriving * view.config.precision.number_bytes // shares
    # The expert's rows back: their output (forward), their gradient (backward).
    yield "ep", "all-to-all", 2, 2 * arriving * view.row_bytes // shares


def _data_parallel(view: RankView) -> Iterator[Sent]:
    """Gradients, in FP32; with the distributed optimizer the updated weights too. And the batch's loss weight and its
    tokens of both modalities.
    """
    parallel = view.config.parallel
    routed = is_routed(view.config.model, parallel)
    if view.dp_size > 1:
        yield "dp", "all-reduce", 1, 3 * FP32
    is_split = view.config.optimizer.distributed
    for chunk in view.parameters:
        of_experts = [piece.numel for piece in chunk if routed and piece.parameter.num_experts]
        shared = [piece.numel for piece in chunk if not (routed and piece.parameter.num_experts)]
        for axis, numbers, ranks in (
            ("dp", shared, view.dp_size * parallel.context_parallel_size),
            ("expert dp", of_experts, expert_replicas(parallel, view.dp_size)),
        ):
            if ranks == 1 or not numbers:
                continue
            if not is_split:
                yield axis, "all-reduce", 1, sum(numbers) * FP32
                continue
            yield axis, "reduce-scatter", 1, buffer_size(numbers, ranks) * FP32
            yield axis, "all-gather", 1, buffer_size(numbers, ranks) * view.config.precision.number_bytes


def buffer_size(numbers: Sequence[int], ranks: int) -> int:
    """Numbers in the distributed optimizer's buffer of these parameters, padding included."""
    aligned = sum(_round_up(n, PARAMETER_ALIGNMENT) for n in numbers)
    return _round_up(aligned, math.lcm(ranks, BUFFER_ALIGNMENT))


def _gradient_norm(view: RankView) -> Iterator[Sent]:
    """One number, summed over the ranks that hold different gradients."""
    parallel = view.config.parallel
    if view.config.optimizer.distributed:
        yield "world", "all-reduce", int(view.world_size > 1), FP32
        return
    replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    yield "replica", "all-reduce", int(replica > 1), FP32
    if parallel.expert_model_parallel_size > 1:
        yield "replica", "all-reduce", 1, FP32  # the experts' own


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
