"""Who is slow, and what a run cost across restarts."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from navil_megatron.cli import main
from navil_megatron.config.run import NaViLConfig
from navil_megatron.layers.transformer_layer import NaViLTransformerLayer
from navil_megatron.runtime.run_time import run_time_of
from tests.e2e.runs import World, make_run, records, train_in_rank
from tests.ranks import run_ranks

SLOW, SECONDS, STEPS = 1, 0.5, 6


def one_slow_rank(rank: int, world_size: int, config: NaViLConfig) -> dict[str, Any]:
    """A run whose rank 1 takes its time in each decoder layer."""
    from torch.nn.modules.module import register_module_forward_hook

    def dawdle(module, _inputs, _output):
        if rank == SLOW and isinstance(module, NaViLTransformerLayer):
            time.sleep(SECONDS)

    handle = register_module_forward_hook(dawdle)
    try:
        return train_in_rank(rank, world_size, config)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "layout", [{}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}], ids=["data", "tensor", "pipe"]
)
def test_a_slow_rank_is_named(world: World, tmp_path: Path, layout: dict[str, Any]) -> None:
    config = make_run(world, tmp_path, parallel=layout, training={"train_steps": STEPS})
    run_ranks(2, one_slow_rank, config)
    found = records(config, "train")
    named = [record["slowest_rank"] for record in found]
    assert named.count(SLOW) >= STEPS - 1, named
    assert sum(record["slowest_rank_factor"] > 1.1 for record in found) >= STEPS - 1
    assert all(0 < record["wait_seconds"] < record["step_seconds"] * 2 for record in found)


def test_a_run_that_lost_steps_says_what_it_cost(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saves = {"directory": str(tmp_path / "checkpoints"), "save_every_steps": 2, "keep_last": 9}
    config = make_run(world, tmp_path, training={"train_steps": 5}, checkpoint=saves)
    run_ranks(1, train_in_rank, config)
    for step in (4, 5):  # the machine died before it had saved these
        shutil.rmtree(tmp_path / "checkpoints" / f"step_{step:08d}")
    run_ranks(1, train_in_rank, config)
    found = records(config, "train")
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 3, 4, 5]
    assert [line["step"] for line in records(config, "start")] == [0, 2]
    assert all(0 < record["goodput"] < 1 for record in found)
    kept = [*found[:2], *found[5:]]
    wall = found[-1]["time"] - records(config, "start")[0]["time"]
    assert found[-1]["goodput"] == pytest.approx(sum(record["useful_seconds"] for record in kept) / wall)
    assert main(["report", config.logging.directory, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["steps"], told["restarts"], told["lost_steps"], told["skipped_steps"]) == (5, 1, 3, 0)
    assert told["goodput"] == pytest.approx(found[-1]["goodput"]) and told["slowest_rank_records"] == {"0": 8}
    assert told["seconds_by_cause"]["lost steps"] == pytest.approx(sum(r["useful_seconds"] for r in found[2:5]))
    assert main(["report", config.logging.directory]) == 0
    assert "1 restarts, 3 steps made again" in capsys.readouterr().out
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no record of a start" in capsys.readouterr().err


def test_a_line_that_was_cut_short_is_passed_over() -> None:
    record = {
        "kind": "train",
        "step": 2,
        "time": 30.0,
        "useful_seconds": 8.0,
        "skipped_steps": 1,
        "slowest_rank": 3,
        "data_wait_seconds": 0.5,
        "wait_seconds": 0.25,
        "paused_seconds": 1.0,
    }
    lines = [json.dumps({"kind": "start", "step": 0, "time": 10.0}), json.dumps(record), json.dumps(record)[:40]]
    found = run_time_of(lines)
    assert (found.step, found.skipped_steps, found.goodput(30.0)) == (2, 1, 0.4)
    assert found.seconds == {"lost steps": 0, "data": 1.0, "other ranks": 0.5, "evaluation and saves": 1.0}
