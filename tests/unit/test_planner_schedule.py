"""The simulated pipeline: known bubbles, core's orders, no overlap on a stage, and layers that balance the encoder."""

from itertools import pairwise

import pytest

from navil_megatron.config.parallel import ParallelConfig
from navil_megatron.planner.picture import draw_schedule
from navil_megatron.planner.schedule import ChunkTime, balanced_layers, most_in_flight, simulate, stage_order

EVEN = ChunkTime(1.0, 2.0)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 4), (2, 4), (4, 4), (4, 8), (4, 64), (8, 512)])
def test_even_stages_idle_as_the_formula_says(stages: int, microbatches: int) -> None:
    schedule = simulate([EVEN] * stages, stages, microbatches)
    assert schedule.seconds == pytest.approx(3.0 * (microbatches + stages - 1))
    assert schedule.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("microbatches", [4, 8, 64])
def test_interleaving_divides_the_idle_time_by_the_chunks(chunks: int, microbatches: int) -> None:
    stages = 4
    schedule = simulate([EVEN] * (stages * chunks), stages, microbatches)
    assert schedule.seconds == pytest.approx(3.0 * chunks * microbatches + 3.0 * (stages - 1))


def test_a_stage_does_one_thing_at_a_time_and_waits_for_its_neighbour() -> None:
    times = [ChunkTime(3.0, 5.0), EVEN, EVEN, ChunkTime(1.5, 2.5)]
    schedule = simulate(times, 2, 6, send_seconds=0.25)
    ends = {(span.is_forward, span.chunk, span.microbatch): span for span in schedule.spans}
    assert len(ends) == len(schedule.spans) == 2 * 4 * 6
    for stage in (0, 1):
        mine = [span for span in schedule.spans if span.stage == stage]
        assert all(before.end <= after.start for before, after in pairwise(mine))
    for (is_forward, chunk, microbatch), span in ends.items():
        if is_forward and chunk > 0:
            assert span.start >= ends[True, chunk - 1, microbatch].end + 0.25
        if not is_forward and chunk < 3:
            assert span.start >= ends[False, chunk + 1, microbatch].end + 0.25
        if not is_forward:
            assert span.start >= ends[True, chunk, microbatch].end


def test_orders_are_cores() -> None:
    """1F1B: a stage runs as many forward passes ahead as stages follow it."""
    order = stage_order(0, 4, 4, 8)
    assert [is_forward for is_forward, _, _ in order[:5]] == [True, True, True, True, False]
    assert [microbatch for is_forward, _, microbatch in order if not is_forward] == list(range(8))
    assert [is_forward for is_forward, _, _ in stage_order(3, 4, 4, 8)[:4]] == [True, False, True, False]
    # Interleaved on 2 stages with 2 chunks: microbatches go in groups of 2 through chunk 0, then chunk 2.
    forward = [(chunk, microbatch) for is_forward, chunk, microbatch in stage_order(0, 2, 4, 4) if is_forward]
    assert forward == [(0, 0), (0, 1), (2, 0), (2, 1), (0, 2), (0, 3), (2, 2), (2, 3)]
    backward = [(chunk, microbatch) for is_forward, chunk, microbatch in stage_order(0, 2, 4, 4) if not is_forward]
    assert backward[:4] == [(2, 0), (2, 1), (0, 0), (0, 1)]


def test_first_stage_keeps_as_many_microbatches_as_there_are_stages() -> None:
    assert [most_in_flight(stage, 4, 16, [10] * 4) for stage in range(4)] == [40, 30, 20, 10]
    assert most_in_flight(0, 4, 2, [10] * 4) == 20


def test_a_slow_first_stage_gets_fewer_layers() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=4)
    counts = balanced_layers(parallel, 24, 1.0, [6.0, 0.0, 0.0, 2.0])
    assert counts == (2, 8, 8, 6)
    uneven = [ChunkTime(n / 3, 2 * n / 3) for n in (2 + 6, 8, 8, 6 + 2)]
    even = [ChunkTime(n / 3, 2 * n / 3) for n in (6 + 6, 6, 6, 6 + 2)]
    assert simulate(uneven, 4, 32).seconds < simulate(even, 4, 32).seconds
    assert sum(balanced_layers(parallel, 24, 1.0, [100.0, 0.0, 0.0, 0.0])) == 24


def test_interleaved_chunks_are_balanced_by_stage() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    counts = balanced_layers(parallel, 12, 1.0, [4.0, 0.0, 0.0, 0.0])
    assert sum(counts) == 12 and counts[0] + counts[2] == 4


def test_the_picture_holds_every_pass_once() -> None:
    schedule = simulate([ChunkTime(2.0, 4.0), EVEN], 2, 4)
    picture = draw_schedule(schedule, "tp1 <pp2>")
    assert picture.startswith("<svg") and "tp1 &lt;pp2&gt;" in picture
    for word in ("F1", "F4", "B1", "B4"):
        assert picture.count(f">{word}<") == 2
