"""A run that hangs ends with one line that says where and who, stacks beside the log, and exit code 3."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from navil_megatron.config.errors import HANG_EXIT_CODE
from navil_megatron.runtime.hang_report import hang_line, missing_ranks
from navil_megatron.runtime.watchdog import Watchdog
from navil_megatron.runtime.whereabouts import Whereabouts
from tests.conftest import REPOSITORY
from tests.distributed.hangs import (
    GUILTY,
    TIMEOUT_SECONDS,
    Ending,
    block_data,
    copies_of_data,
    dawdle,
    kill_process,
    run_until_it_ends,
    save_slowly,
    skip_collective,
    stick_in_backward,
    stick_in_forward,
    stop_process,
)
from tests.e2e.runs import World, build_world, make_run, records, write_toml
from tests.ranks import run_ranks, start_session

LAYOUTS = {"pipeline 2": {"pp": 2}, "tensor 2": {"tp": 2}, "data 2": {}}
SLACK_SECONDS = 8
"""For the report and for a machine that is busy."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Shards and tokenizer, made once."""
    return build_world(tmp_path_factory.mktemp("world"))


def hang(world: World, folder: Path, layout: str, **fault: Any) -> Ending:
    """A long run of two ranks, two microbatches a step, with a fault."""
    replicas = 2 if layout == "data 2" else 1
    config = make_run(
        world,
        folder,
        parallel=LAYOUTS[layout],
        training={"train_steps": 1_000_000, "global_batch_size": 2 * replicas},
        runtime={"collective_timeout_seconds": TIMEOUT_SECONDS},
    )
    ending = run_until_it_ends(folder, copies_of_data(config, folder, 2), **fault)
    assert len(ending.lines) == 1, ending.lines
    assert ending.seconds < TIMEOUT_SECONDS + SLACK_SECONDS
    assert ending.exit_codes[0] == HANG_EXIT_CODE
    return ending


def parts(line: str) -> tuple[str, str]:
    """What is said of the rank that waits, and of those that are missing."""
    found = re.fullmatch(
        r"error: step \d+ (?:hung|broke off): (rank .*); did not arrive: (rank .*); stacks: .*stacks-rank\*\.txt", line
    )
    assert found is not None, line
    return found[1], found[2]


def stage_of(layout: str) -> int:
    """Pipeline stage of the guilty rank."""
    return GUILTY if layout == "pipeline 2" else 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_without_data(world: World, tmp_path: Path, layout: str) -> None:
    ending = hang(world, tmp_path, layout, outer=block_data)
    waits, missing = parts(ending.lines[0])
    step = re.match(r"rank 0 \(step (\d+), pipeline stage 0, ", waits)
    assert step is not None
    place = r"for [2-9] s at data/prefetch\.py:\d+ __next__\)"
    assert re.fullmatch(rf"rank 1 \(step {step[1]}, pipeline stage {stage_of(layout)}, {place}", missing), missing
    assert ending.exit_codes == [HANG_EXIT_CODE] * 2
    assert "source.py" in ending.stacks[1] and "prefetch.py" in ending.stacks[1]
    assert "watchdog" in ending.stacks[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_rank(world: World, tmp_path: Path, layout: str) -> None:
    ending = hang(world, tmp_path, layout, outer=kill_process)
    waits, missing = parts(ending.lines[0])
    assert re.match(r"rank 0 \(step \d+, pipeline stage 0, ", waits)
    assert missing == f"rank 1 (pipeline stage {stage_of(layout)}, its process is gone or stopped)"
    assert set(ending.stacks) == {0}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stopped_rank(world: World, tmp_path: Path, layout: str) -> None:
    ending = hang(world, tmp_path, layout, outer=stop_process)
    waits, missing = parts(ending.lines[0])
    assert re.search(r", for [2-9] s in [\w ]+ at \S+\.py:\d+ \w+\)$", waits), waits
    assert missing == f"rank 1 (pipeline stage {stage_of(layout)}, its process is gone or stopped)"
    assert "loop.py" in ending.stacks[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_in_another_collective(world: World, tmp_path: Path, layout: str) -> None:
    ending = hang(world, tmp_path, layout, inner=skip_collective)
    waits, missing = parts(ending.lines[0])
    assert "all_reduce of all ranks" in waits
    assert missing.startswith("rank 1 (step ") and re.search(r", for [2-9] s in ", missing)
    assert set(ending.stacks) == {0, 1}
    assert "stop_asked" in ending.stacks[0] and "stop_asked" not in ending.stacks[1]


@pytest.mark.parametrize(("fault", "direction"), [(stick_in_forward, "forward"), (stick_in_backward, "backward")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_stuck_in_a_layer(world: World, tmp_path: Path, layout: str, fault: Callable, direction: str) -> None:
    ending = hang(world, tmp_path, layout, inner=fault)
    waits, missing = parts(ending.lines[0])
    assert f"pipeline stage {stage_of(layout)}, last began {direction} of microbatch 2, " in missing
    if direction == "forward":
        # The guilty rank's first layer is the second of the whole model under pipeline 2.
        assert f"module decoder.layers.{stage_of(layout)}, " in missing
    if layout == "tensor 2":
        assert f"last began {direction} of microbatch 2, module decoder.layers." in waits, waits
        assert "TENSOR_MODEL_PARALLEL_GROUP" in waits
    if layout == "data 2":
        assert re.search(r"in \w+ of DATA_PARALLEL_GROUP\w* at \S+ \w*(?:grad_sync|gradients)\w*\)", waits), waits
    assert "_stick_here" in ending.stacks[1]


def test_without_the_flight_recorder_nobody_is_blamed(world: World, tmp_path: Path) -> None:
    """No stack shows that rank 0 waits in a collective, so the line tells where both are, and no more."""
    ending = hang(world, tmp_path, "tensor 2", inner=stick_in_forward, environment={"TORCH_FR_BUFFER_SIZE": "0"})
    told = (
        r"\(step 3, pipeline stage 0, last began forward of microbatch 2, module decoder\.layers\.\d, for [2-9] s at "
    )
    assert re.fullmatch(
        rf"error: step 3 hung: rank 0 {told}megatron/core/tensor_parallel/mappings\.py:\d+ _reduce\); "
        rf"who did not arrive is not known, the others: rank 1 {told}megatron/core/\S+ __call__\); stacks: .*",
        ending.lines[0],
    ), ending.lines[0]
    assert set(ending.stacks) == {0, 1}


def test_only_the_guilty_of_four_ranks_is_named(world: World, tmp_path: Path) -> None:
    config = make_run(
        world,
        tmp_path,
        parallel={"tp": 2, "pp": 2},
        training={"train_steps": 1_000_000, "global_batch_size": 2},
        runtime={"collective_timeout_seconds": TIMEOUT_SECONDS},
    )
    ending = run_until_it_ends(tmp_path, copies_of_data(config, tmp_path, 4), inner=stick_in_forward)
    waits, missing = parts("\n".join(ending.lines))
    assert waits.startswith("rank 0 ") and "TENSOR_MODEL_PARALLEL_GROUP" in waits
    assert "rank 1 (step 3, pipeline stage 0, last began forward of microbatch 2, module decoder.layers.0" in missing
    assert missing.count("rank ") == 1
    assert ending.exit_codes == [HANG_EXIT_CODE] * 4 and set(ending.stacks) == {0, 1, 2, 3}


def test_slow_step_is_no_hang(world: World, tmp_path: Path) -> None:
    config = make_run(
        world,
        tmp_path,
        parallel={"tp": 2},
        training={"train_steps": 4},
        runtime={"collective_timeout_seconds": TIMEOUT_SECONDS},
    )
    ending = run_until_it_ends(tmp_path, [config, config], inner=dawdle)
    assert ending.exit_codes == [0, 0] and not ending.lines and not ending.stacks
    assert max(record["step_seconds"] for record in records(config, "train")) > 0.5 * TIMEOUT_SECONDS


def test_slow_save_is_no_hang(world: World, tmp_path: Path) -> None:
    config = make_run(
        world,
        tmp_path,
        training={"train_steps": 2},
        runtime={"collective_timeout_seconds": TIMEOUT_SECONDS},
    )
    started = time.monotonic()
    ending = run_until_it_ends(tmp_path, [config], inner=save_slowly, guilty=0)
    assert ending.exit_codes == [0] and not ending.lines and not ending.stacks
    assert time.monotonic() - started > 1.5 * TIMEOUT_SECONDS


def test_one_rank_alone(world: World, tmp_path: Path) -> None:
    config = make_run(
        world,
        tmp_path,
        training={"train_steps": 1_000_000},
        runtime={"collective_timeout_seconds": TIMEOUT_SECONDS},
    )
    (config,) = copies_of_data(config, tmp_path, 1)
    ending = run_until_it_ends(tmp_path, [config], outer=block_data, guilty=0)
    assert re.fullmatch(
        r"error: step (\d+) hung: rank 0 \(step \1, pipeline stage 0, for \d s at data/prefetch\.py:\d+ __next__\); "
        r"stacks: .*",
        "\n".join(ending.lines),
    )
    assert ending.exit_codes == [HANG_EXIT_CODE]


def test_train_command(world: World, tmp_path: Path) -> None:
    """``navil-megatron train --nproc 2``: one error line, no traceback, the exit code of a hang."""
    config = make_run(
        world,
        tmp_path,
        parallel={"pp": 2},
        training={"train_steps": 1_000_000, "global_batch_size": 2},
        runtime={"collective_timeout_seconds": TIMEOUT_SECONDS},
    )
    (config,) = copies_of_data(config, tmp_path, 1)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "navil_megatron.cli",
            "train",
            str(write_toml(config, tmp_path / "run.toml")),
            "--nproc",
            "2",
        ],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while len(records(config, "train")) < 2 and process.poll() is None:
            time.sleep(0.1)
        block_data(0, config)
        stderr = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == HANG_EXIT_CODE, stderr
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d INFO", line)]
    assert line.startswith("error: step ") and re.search(r"at data/prefetch\.py:\d+ __next__\)", line)


def answer(rank: int, begun: dict[str, int], waits_for: str = "", **fields: object) -> Whereabouts:
    """A rank that has begun these collectives and waits in the newest of one group, with some fields changed."""
    usual: dict = {
        "stage": 0,
        "step": 7,
        "position": "last began forward of microbatch 3, module decoder.layers.1",
        "place": "training/step.py:1 train_step",
        "stalled_seconds": 600.0,
        "is_cut_off": False,
        "operation": f"all_reduce of {waits_for}" if waits_for else "",
    }
    number = begun.get(waits_for, 0)
    return Whereabouts(rank=rank, begun=begun, group=waits_for, number=number, **(usual | fields))


def test_victims_of_a_hang_are_not_blamed() -> None:
    """Rank 3 is at work; 2 waits for it, 1 waits for it in the pipeline, 0 waits for 1: only 3 is named."""
    answers = {
        0: answer(0, {"a": 5}, "a"),
        1: answer(1, {"a": 4}, operation="send or receive between pipeline stages"),
        2: answer(2, {"b": 9}, "b"),
        3: answer(3, {"b": 8}),
    }
    assert missing_ranks(answers) == [3]
    assert hang_line(answers, 0, "logs").startswith("error: step 7 hung: rank 2 (step 7, ")


def test_waits_that_no_stack_shows_are_found_by_counting() -> None:
    """On a GPU a wait is a device sync without a frame of a collective; who is ahead of others waits for them."""
    answers = {
        0: answer(0, {"a": 5, "b": 2}, "a"),
        1: answer(1, {"a": 4, "c": 2}, "c"),
        2: answer(2, {"b": 2, "d": 7}, "d"),
        3: answer(3, {"c": 1, "d": 6}),
    }
    assert missing_ranks(answers) == [3]


def test_who_waits_in_the_earlier_step_waits_for_the_others() -> None:
    """Both wait, in different collectives: the later one left out what the earlier one waits in."""
    answers = {0: answer(0, {"a": 5, "b": 2}, "a"), 1: answer(1, {"a": 4, "b": 3}, "b", step=8)}
    assert missing_ranks(answers) == [1]


@pytest.mark.parametrize("waits_for", ["", "a"])
def test_nobody_is_blamed_where_the_answers_do_not_tell(waits_for: str) -> None:
    """The recorder is off and the stacks show no wait; or all wait in the same collective."""
    answers = {rank: answer(rank, {"a": 5} if waits_for else {}, waits_for) for rank in (0, 1)}
    assert missing_ranks(answers) == []
    line = hang_line(answers, 1, "logs/stacks-rank*.txt")
    where = "in all_reduce of a at" if waits_for else "at"
    told = "step 7, pipeline stage 0, last began forward of microbatch 3, module decoder.layers.1, for 600 s"
    assert line == (
        f"error: step 7 hung: rank 0 ({told} {where} training/step.py:1 train_step); who did not arrive is not known, "
        f"the others: rank 1 ({told} {where} training/step.py:1 train_step); stacks: logs/stacks-rank*.txt"
    )


def test_many_missing_ranks_are_not_all_listed() -> None:
    gone = {rank: f"rank {rank} (pipeline stage 0, its process is gone or stopped)" for rank in range(1, 41)}
    line = hang_line({0: answer(0, {}), **gone}, 0, "logs/stacks-rank*.txt")
    assert line.count("its process is gone") == 16 and " and 24 more" in line


def close_often(rank: int, world_size: int, logs: str) -> int:
    with start_session(rank, world_size) as session:
        for _ in range(50):
            watchdog = Watchdog(0, 0.02, Path(logs), one_machine=True)
            time.sleep(0.001)
            busy_until = time.perf_counter() + 0.002
            while time.perf_counter() < busy_until:  # the other thread's wait ends while this one keeps the interpreter
                pass
            watchdog.close()
        return session.rank


def test_a_watch_that_ends_ends_no_run(tmp_path: Path) -> None:
    """Also where it ends while the thread that looks, here every millisecond, is about to."""
    assert run_ranks(1, close_often, str(tmp_path)) == [0]
