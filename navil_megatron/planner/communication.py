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
from navil_megatron.blueprint.vocabulary import held_rows
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

    num_predictions: int  # positions with loss
    gathered_features: int
    """Image tokens after the gather over the ranks that share a row: each share is padded to the largest."""
    text_tokens: int
    visual_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTraffic:
    """One rank's collectives: all that the formula looks at, and the formula."""

    config: NaViLConfig
    pp_rank: int
    dp_rank: int
    world_size: int
    batch: Sequence[Sequence[MicrobatchSizes]]  # the global batch: microbatches of each replica
    parameters: Sequence[Sequence[HeldParameter]]  # those that train, of each model chunk of this rank

    def of_step(self) -> TrafficTable:
        """Calls and bytes of one step."""
        mine, stages = self.batch[self.dp_rank], self.config.parallel.pipeline_model_parallel_size
        layers = sum(
            layers_of_chunks(self.config.parallel, self.config.model.language.num_layers)[self.pp_rank :: stages]
        )
        in_layers = chain.from_iterable(map(self.of_layer, range(len(mine))))
        found: TrafficTable = defaultdict(Traffic)
        for axis, collective, calls, num_bytes in chain(
            ((axis, word, calls * layers, size * layers) for axis, word, calls, size in in_layers),
            *map(self.of_edges, mine),
            self._pipeline(len(mine)),
            self.of_gradients(),
            self._judgement(),
        ):
            if calls:
                found[axis, collective] += Traffic(calls, num_bytes)
        return dict(found)

    def of_layer(self, number: int) -> Iterator[Sent]:
        """Of one decoder layer and the replica's microbatch of this number, forward and backward."""
        parallel = self.config.parallel
        if parallel.tensor_model_parallel_size > 1:
            yield from self._routed_tensor_layer() if self._is_routed else self._tensor_layer()
        if parallel.context_parallel_size > 1:
            yield from self._context_layer()
        if parallel.expert_model_parallel_size > 1:
            yield from self._expert_layer(number)

    def of_edges(self, microbatch: MicrobatchSizes) -> Iterator[Sent]:
        """Around the layers: embeddings and images before them, the head behind."""
        parallel = self.config.parallel
        if parallel.tensor_model_parallel_size > 1:
            yield from self._tensor_edges(microbatch)
        if parallel.context_parallel_size > 1 and self._is_first:
            # Features of all ranks' images, and the gradients of this rank's summed over the ranks that used them.
            gathered = microbatch.gathered_features * self._token_bytes
            yield "cp", "all-gather", 1, gathered
            yield "cp", "reduce-scatter", 1, gathered // parallel.tensor_model_parallel_size

    def of_gradients(self) -> Iterator[Sent]:
        """Gradients and updated weights, over the ranks that share them; the batch's loss weight and tokens too."""
        parallel, dp_size = self.config.parallel, len(self.batch)
        if dp_size > 1:
            yield "dp", "all-reduce", 1, 3 * FP32
        for chunk in self.parameters:
            of_experts = [piece.numel for piece in chunk if self._is_routed and piece.parameter.num_experts]
            shared = [piece.numel for piece in chunk if not (self._is_routed and piece.parameter.num_experts)]
            for axis, numbers, ranks in (
                ("dp", shared, dp_size * parallel.context_parallel_size),
                ("expert dp", of_experts, expert_replicas(parallel, dp_size)),
            ):
                if ranks > 1 and numbers and self.config.optimizer.distributed:
                    size = buffer_size(numbers, ranks)
                    yield axis, "reduce-scatter", 1, size * FP32
                    yield axis, "all-gather", 1, size * self.config.precision.number_bytes
                elif ranks > 1 and numbers:
                    yield axis, "all-reduce", 1, sum(numbers) * FP32
        if parallel.tensor_model_parallel_size > 1:
            yield from self._tensor_gradients()

    @property
    def _is_routed(self) -> bool:
        return is_routed(self.config.model, self.config.parallel)

    @property
    def _is_first(self) -> bool:
        return self.pp_rank == 0

    @property
    def _is_last(self) -> bool:
        return self.pp_rank == self.config.parallel.pipeline_model_parallel_size - 1

    @property
    def _token_bytes(self) -> int:
        return self.config.model.language.hidden_size * self.config.precision.number_bytes

    @property
    def _tokens_bytes(self) -> int:
        """Of a microbatch's hidden states on a context-parallel rank."""
        return self.config.rank_tokens * self._token_bytes

    @property
    def _stops_early(self) -> bool:
        """Whether a feed-forward that is computed again stops at its last saved tensor, before the sum of its output.
        Transformer Engine's kernels go on to the end.
        """
        return self.config.runtime.kernels == "torch" and self.config.training.recomputes("mlp")

    def _tensor_layer(self) -> Iterator[Sent]:
        training, size = self.config.training, self._tokens_bytes
        # A part that is computed again repeats the forward collectives of its column and its row layer.
        again = (training.recompute == "full") + training.recomputes("mlp")
        sums_again = again - self._stops_early
        # Attention and feed-forward are a column and a row layer each.
        if self.config.parallel.sequence_parallel:
            # Each column layer gathers, forward and again backward; each row layer gathers its gradient.
            yield "tp", "all-gather", 6 + again, (6 + again) * size
            # Each row layer scatters its sum; each column layer the sum of its gradients.
            yield "tp", "reduce-scatter", 4 + sums_again, (4 + sums_again) * size
        else:
            # Outputs of the row layers, gradients of the column layers.
            yield "tp", "all-reduce", 4 + sums_again, (4 + sums_again) * size

    def _routed_tensor_layer(self) -> Iterator[Sent]:
        """The same under sequence parallelism where tokens are sent, or sorted, to their experts, without routers."""
        training, parallel, size = self.config.training, self.config.parallel, self._tokens_bytes
        again = training.recompute == "full"
        yield "tp", "all-gather", 3 + again, (3 + again) * size
        yield "tp", "reduce-scatter", 2 + again, (2 + again) * size
        if parallel.expert_tensor_size > 1:
            # Tokens are gathered and outputs scattered, and gradients the other way: of those that all-to-all has
            # brought, or without expert parallelism of the rank's own.
            is_sent = parallel.expert_model_parallel_size > 1
            size *= self.config.model.language.experts_per_token if is_sent else 1
            again = training.recomputes("mlp")
            sums_again = again - self._stops_early
            yield "tp", "all-gather", 2 + again, (2 + again) * size
            yield "tp", "reduce-scatter", 2 + sums_again, (2 + sums_again) * size

    def _tensor_edges(self, microbatch: MicrobatchSizes) -> Iterator[Sent]:
        parallel, size, num_predictions = self.config.parallel, self._tokens_bytes, microbatch.num_predictions
        if self._is_first:
            yield "tp", "all-reduce", 1, size  # the embedding table is split by vocabulary
            if parallel.context_parallel_size == 1:
                yield "tp", "all-gather", 1, microbatch.gathered_features * self._token_bytes
            if parallel.sequence_parallel:
                yield "tp", "all-gather", 1, size  # gradient of the embeddings
        if self._is_last:
            if parallel.sequence_parallel:
                yield "tp", "all-gather", 1, size  # hidden states for the head
            # The head's input gradient, one chunk of positions after the other.
            num_chunks = math.ceil(num_predictions / self.config.training.loss_chunk_tokens)
            yield "tp", "all-reduce", num_chunks, num_predictions * self._token_bytes
            # Cross entropy over a split vocabulary: maximum; then label's logit and sum of exponentials together.
            yield "tp", "all-reduce", 2, 3 * num_predictions * FP32

    def _tensor_gradients(self) -> Iterator[Sent]:
        """Weights that every tensor-parallel rank holds whole but used on other tokens, heads or images."""
        held = list(chain.from_iterable(self.parameters))
        kinds = ("heads", "tokens") if self.config.parallel.sequence_parallel else ("heads",)
        summed = sum(piece.numel for piece in held if piece.parameter.used_on in kinds)
        yield "tp", "all-reduce", int(summed > 0), summed * FP32  # core sends them as one
        images = [piece.numel for piece in held if piece.parameter.used_on == "images"]
        yield "tp", "all-reduce", len(images), sum(images) * FP32

    def _context_layer(self) -> Iterator[Sent]:
        """Query, key and value one way, the softmax's output the other, and both again for their gradients."""
        language, training = self.config.model.language, self.config.training
        head = self.config.rank_tokens * language.head_dim * self.config.precision.number_bytes
        head //= self.config.parallel.tensor_model_parallel_size
        there = (language.num_attention_heads + 2 * language.num_query_groups) * head
        back = language.num_attention_heads * head
        # A part that is computed again stops where its last saved tensor is: the softmax's output is not sent again.
        for calls, size in ((2 + training.recomputes("attention"), there), (2 + (training.recompute == "full"), back)):
            yield "cp", "all-to-all", calls, calls * size

    def _expert_layer(self, number: int) -> Iterator[Sent]:
        """Tokens to the rank of their expert and back, forward and backward."""
        parallel, language = self.config.parallel, self.config.model.language
        ranks, shares = parallel.expert_model_parallel_size, parallel.sequence_ranks
        number_bytes = self.config.precision.number_bytes
        first, times = self.dp_rank - self.dp_rank % ranks, language.experts_per_token
        held = local_experts(self.dp_rank % ranks, ranks, language.num_experts)
        # Context-parallel ranks of a replica hold equally many tokens of each modality.
        context = parallel.context_parallel_size
        microbatches = [replica[number] for replica in self.batch for _ in range(context)]
        senders = [microbatches[rank % len(microbatches)] for rank in range(first, first + ranks)]
        # Routers being even; of one expert per modality it is so.
        arriving = times * sum(
            getattr(sender, f"{modality}_tokens") * len(numbers) // language.num_experts
            for sender in senders
            for modality, numbers in held.items()
        )
        # Each rank tells how many tokens go to which of the experts.
        yield "ep", "all-gather", 1, ranks * len(MODALITIES) * language.num_experts * INT64
        # Own tokens out (forward) and their output's gradient out (backward); core sends each one's probability along,
        # and gets a learned one's gradient back.
        probabilities = self.config.rank_tokens * number_bytes
        yield "ep", "all-to-all", 3, times * (2 * self._tokens_bytes + probabilities) // shares
        if language.num_experts > 1:
            yield "ep", "all-to-all", 1, arriving * number_bytes // shares
        # The expert's tokens back: their output (forward), their gradient (backward).
        yield "ep", "all-to-all", 2, 2 * arriving * self._token_bytes // shares

    def _pipeline(self, num_microbatches: int) -> Iterator[Sent]:
        """Each chunk sends its activations on and its gradient back, but for the first and the last of all."""
        parallel, model = self.config.parallel, self.config.model
        if parallel.pipeline_model_parallel_size == 1:
            return
        chunks = parallel.num_chunks // parallel.pipeline_model_parallel_size
        sends = num_microbatches * (2 * chunks - self._is_first - self._is_last)
        yield "pp", "send", sends, sends * self._tokens_bytes // parallel.sequence_ranks
        if model.language.tied_embeddings and (self._is_first or self._is_last):
            rows = held_rows(model.language.vocab_size, parallel.tensor_model_parallel_size)
            yield "embd", "all-reduce", 1, rows * model.language.hidden_size * FP32

    def _judgement(self) -> Iterator[Sent]:
        """The gradient norm, summed over the ranks that hold different gradients; then loss, weight and norm of every
        rank, by which all make an update or none does.
        """
        parallel = self.config.parallel
        yield "world", "all-gather", int(self.world_size > 1), self.world_size * 3 * FP32
        if self.config.optimizer.distributed:
            yield "world", "all-reduce", int(self.world_size > 1), FP32
            return
        replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        yield "replica", "all-reduce", int(replica > 1), FP32
        if parallel.expert_model_parallel_size > 1:
            yield "replica", "all-reduce", 1, FP32  # the experts' own


def is_exact(config: NaViLConfig) -> bool:
    """Whether the counted bytes equal the formula's: everything trains, experts stand beside data parallelism, and no
    context-parallel rank needs to say how many predictions it drew.
    """
    parallel = config.parallel
    is_plain = not is_routed(config.model, parallel) or parallel.model_parallel_size == 1
    is_plain &= parallel.context_parallel_size == 1 or parallel.tensor_model_parallel_size == 1
    # Where learned routers send tokens, and so how many arrive, is not known before.
    is_known = config.model.language.num_experts == 1 or parallel.expert_model_parallel_size == 1
    return config.training.phase == "s2" and is_plain and is_known


def buffer_size(numbers: Sequence[int], ranks: int) -> int:
    """Numbers in the distributed optimizer's buffer of these parameters, padding included."""
    aligned = sum(_round_up(n, PARAMETER_ALIGNMENT) for n in numbers)
    return _round_up(aligned, math.lcm(ranks, BUFFER_ALIGNMENT))


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
