"""A pipeline schedule in time: who computes what when, how long stages idle, and which layout of layers balances them.

The orders are those of megatron-core's 1F1B and interleaved schedules. A chunk's work waits for the activations, or
gradients, of its neighbour and for the stage to be free; nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from navil_megatron.config.parallel import ParallelConfig

_SIMULATED_ROUNDS = 4
"""Microbatches simulated, in multiples of the stages; every further one takes as long as the ones before it."""


@dataclass(frozen=True, slots=True)
class ChunkTime:
    """Seconds of one microbatch in one chunk."""

    forward: float
    backward: float

    def __add__(self, other: "ChunkTime") -> "ChunkTime":
        return ChunkTime(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> "ChunkTime":
        return ChunkTime(self.forward * times, self.backward * times)

    @property
    def both(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True, slots=True)
class Span:
    """One forward or backward pass of a chunk."""

    stage: int
    chunk: int  # in the order of the model
    microbatch: int
    is_forward: bool
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Schedule:
    """What the simulation found."""

    spans: tuple[Span, ...]
    """Of the microbatches that were simulated, stage by stage in the order of execution."""
    seconds: float  # all microbatches, first forward to last backward
    bubble: float  # share of that time in which a stage idles, mean over the stages


def simulate(times: Sequence[ChunkTime], num_stages: int, num_microbatches: int, send_seconds: float = 0) -> Schedule:
    """Run a step: ``times`` of each chunk in the order of the model, more than one a stage being the interleaved
    schedule, whose microbatches are a multiple of the stages; ``send_seconds`` pass between chunks of two stages.
    """
    simulated = min(num_microbatches, _SIMULATED_ROUNDS * num_stages)
    spans = _spans(times, num_stages, simulated, send_seconds)
    loads = [sum(time.both for time in times[stage::num_stages]) for stage in range(num_stages)]
    seconds = max(span.end for span in spans)
    if num_microbatches > simulated:
        half = max(span.end for span in _spans(times, num_stages, simulated // 2, send_seconds))
        seconds += (num_microbatches - simulated) * (seconds - half) / (simulated - simulated // 2)
    idle = 1 - num_microbatches * sum(loads) / (num_stages * seconds) if seconds else 0.0
    return Schedule(tuple(spans), seconds, max(idle, 0.0))


def stage_order(stage: int, num_stages: int, num_chunks: int, num_microbatches: int) -> list[tuple[bool, int, int]]:
    """(is forward, chunk in the order of the model, microbatch) of everything a stage does, first to last."""
    per_stage, ahead = num_chunks // num_stages, num_stages - stage - 1
    total = num_microbatches * per_stage
    warmup = min(ahead if per_stage == 1 else 2 * ahead + (per_stage - 1) * num_stages, total)

    def unit(number: int, is_forward: bool) -> tuple[bool, int, int]:
        # Groups of as many microbatches as stages pass a chunk before the next chunk's turn.
        turn, inside = divmod(number, num_stages * per_stage)
        position, offset = divmod(inside, num_stages)
        position = position if is_forward else per_stage - 1 - position
        microbatch = number if per_stage == 1 else turn * num_stages + offset
        return is_forward, position * num_stages + stage, microbatch

    order = [unit(number, True) for number in range(warmup)]
    for number in range(total - warmup):
        order += [unit(warmup + number, True), unit(number, False)]
    return order + [unit(number, False) for number in range(total - warmup, total)]


def most_in_flight(stage: int, num_stages: int, num_microbatches: int, chunk_bytes: Sequence[int]) -> int:
    """The most bytes that a stage's chunks keep between forward and backward passes, ``chunk_bytes`` a microbatch."""
    held = peak = 0
    simulated = min(num_microbatches, _SIMULATED_ROUNDS * num_stages)
    for is_forward, chunk, _ in stage_order(stage, num_stages, len(chunk_bytes), simulated):
        held += chunk_bytes[chunk] if is_forward else -chunk_bytes[chunk]
        peak = max(peak, held)
    return peak


def balanced_layers(parallel: ParallelConfig, num_layers: int, layer: float, extra: Sequence[float]) -> tuple[int, ...]:
    """Decoder layers of each chunk so that the slowest stage is as fast as can be: ``layer`` seconds each, beside the
    ``extra`` seconds of a chunk, for encoder and embeddings on the first and the head on the last.
    """
    stages, chunks = parallel.pipeline_model_parallel_size, len(extra)
    counts = [0] * chunks
    loads = [sum(extra[stage::stages]) for stage in range(stages)]
    for _ in range(num_layers):
        # Of equally loaded stages the later one, which keeps fewer microbatches; of its chunks the lighter.
        stage = min(range(stages), key=lambda stage: (loads[stage], -stage))
        chunk = min(range(stage, chunks, stages), key=lambda chunk: extra[chunk] + counts[chunk] * layer)
        counts[chunk] += 1
        loads[stage] += layer
    return tuple(counts)


def _spans(times: Sequence[ChunkTime], num_stages: int, num_microbatches: int, send_seconds: float) -> list[Span]:
    last = len(times) - 1
    orders = [stage_order(stage, num_stages, len(times), num_microbatches) for stage in range(num_stages)]
    ends: dict[tuple[bool, int, int], float] = {}
    done, clocks = [0] * num_stages, [0.0] * num_stages
    spans: list[list[Span]] = [[] for _ in orders]
    while any(done[stage] < len(order) for stage, order in enumerate(orders)):
        before = sum(done)
        for stage, order in enumerate(orders):
            while done[stage] < len(order):
                is_forward, chunk, microbatch = order[done[stage]]
                if is_forward:
                    needed = None if chunk == 0 else (True, chunk - 1, microbatch)
                else:
                    needed = (True, last, microbatch) if chunk == last else (False, chunk + 1, microbatch)
                if needed is not None and needed not in ends:
                    break
                is_sent = needed is not None and needed[1] % num_stages != stage
                ready = ends[needed] + (send_seconds if is_sent else 0) if needed is not None else 0.0
                start = max(clocks[stage], ready)
                end = start + (times[chunk].forward if is_forward else times[chunk].backward)
                spans[stage].append(Span(stage, chunk, microbatch, is_forward, start, end))
                ends[is_forward, chunk, microbatch] = clocks[stage] = end
                done[stage] += 1
        if sum(done) == before:
            raise ValueError(f"{num_microbatches} microbatches do not fit {len(times)} chunks on {num_stages} stages")
    return [span for of_stage in spans for span in of_stage]
