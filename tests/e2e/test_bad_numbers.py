"""Runs that meet a bad number: they go on or end as asked, and what they leave behind is finite."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from navil_megatron.cli import main
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.loader import plan_run
from navil_megatron.data.shards.source import Source
from navil_megatron.replay import config_of_run
from navil_megatron.replay import main as replay_main
from navil_megatron.training.replay import replay
from tests.e2e.poison import poison
from tests.e2e.runs import World, make_run, pretrain_in_rank, records, saved_steps, train_in_rank, write_toml
from tests.ranks import run_ranks, start_session
from tests.whole_checkpoint import read_whole_checkpoint

STEPS = 8
BF16 = {"precision": {"type": "bf16"}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data": (2, BF16),
    "tensor and pipeline": (4, {**BF16, "parallel": {"tp": 2, "sequence_parallel": True, "pp": 2}}),
}


def plan_of(world: World, config: NaViLConfig) -> list[list[list[int]]]:
    """Samples of each row of each step."""
    plan = plan_run(config, [Source(world.train_index)])
    steps = range(config.training.train_steps)
    return [[[sample.number for sample in row.samples] for row in plan.step_rows(step)] for step in steps]


def numbers_by_step(world: World, config: NaViLConfig) -> list[list[int]]:
    """Samples of each step."""
    return [[number for row in rows for number in row] for rows in plan_of(world, config)]


def sample_with_image(world: World, numbers: list[list[int]], step: int) -> int:
    """One that the step holds."""
    index = Source(world.train_index).index
    return next(number for number in numbers[step - 1] if len(index.images_of(number)))


def bad_steps(config: NaViLConfig) -> list[dict[str, Any]]:
    path = Path(config.logging.directory) / "bad_steps.jsonl"
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def poisoned_run(rank: int, world_size: int, config: NaViLConfig, number: int) -> dict[str, Any]:
    poison(number)
    return train_in_rank(rank, world_size, config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_poisoned_sample_is_passed_over_and_named(world: World, tmp_path: Path, layout: str) -> None:
    world_size, sections = LAYOUTS[layout]
    config = make_run(
        world,
        tmp_path,
        **sections,
        training={"train_steps": STEPS, "global_batch_size": 4},
        checkpoint={"directory": str(tmp_path / "checkpoints"), "save_every_steps": 1, "keep_last": 1},
    )
    rows_by_step, numbers = plan_of(world, config), numbers_by_step(world, config)
    guilty = sample_with_image(world, numbers, step=4)
    bad = [step for step, held in enumerate(numbers, 1) if guilty in held]
    assert 4 in bad and len(bad) < STEPS
    states = run_ranks(world_size, poisoned_run, config, guilty)
    assert all(state == states[0] for state in states)
    assert states[0]["refused_steps"] == bad and states[0]["step"] == STEPS
    text = (Path(config.logging.directory) / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    found = records(config, "train")
    assert [record["step"] for record in found if record["skipped_steps"]] == bad
    assert [record["step"] for record in found if record["loss"] is None] == bad
    assert [record["samples"] for record in found] == [len(held) for held in numbers]
    weights = read_whole_checkpoint(Path(config.checkpoint.directory) / f"step_{STEPS:08d}")[1]
    assert all(weight.isfinite().all() for weight in weights.values())
    told = bad_steps(config)
    assert [(line["step"], line["action"]) for line in told] == [(step, "skipped") for step in bad]
    for line in told:
        (named,) = line["samples"].values()
        assert list(line["samples"]) == [world.train_index]
        # The microbatch that had it, one row of four, not the whole step.
        assert guilty in named and len(named) < len(numbers[line["step"] - 1])
        assert set(line["loss_not_finite_on_ranks"]) <= set(line["ranks"])
        # Whoever computes the loss of a row that holds it: a replica, or the last stage's tensor-parallel ranks.
        rows = sum(guilty in row for row in rows_by_step[line["step"] - 1])
        assert len(line["loss_not_finite_on_ranks"]) == (min(rows, 2) if layout == "data" else 2)

    # The same step again, with the poison and without.
    again = run_ranks(world_size, replayed, config, guilty, 4)
    bad_again, sample, place = again[0]
    assert bad_again.startswith("step 4 is bad again: loss and gradient norm not finite")
    assert sample == f"sample: {guilty} of {world.train_index}"
    assert place.startswith("first number that is none: in what leaves vision_encoder.")
    assert int(place.rpartition("on rank ")[2]) in (told[0]["ranks"] if layout == "data" else (0, 1))
    sound, fault = run_ranks(world_size, replayed, config, None, 4)[0]
    assert sound.startswith("step 4 is sound: loss ")
    ranks = ", ".join(map(str, told[0]["loss_not_finite_on_ranks"]))
    assert "which did not happen again: a fault of the machine of rank" in fault and fault.endswith(f" {ranks}")


def replayed(rank: int, world_size: int, config: NaViLConfig, number: int | None, step: int) -> list[str]:
    poison(number)
    with start_session(rank, world_size, config) as session:
        return replay(config, session, step)


def test_replay_takes_the_config_from_the_checkpoints(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(world, tmp_path, training={"train_steps": 2})
    run_ranks(1, train_in_rank, config)
    assert config_of_run(Path(config.checkpoint.directory)) == config
    loss = records(config, "train")[1]["loss"]
    ((code, said),) = run_ranks(1, replay_in_rank, config.checkpoint.directory, "2")
    assert code == 0 and said.startswith(f"step 2 is sound: loss {loss:.6g}, ")
    assert main(["replay", str(tmp_path), "2"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def replay_in_rank(_rank: int, _world_size: int, *words: str) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = replay_main(words)
    return code, said.getvalue()


def pretrain_poisoned(rank: int, world_size: int, config: Path, number: int | None, *overrides: str) -> tuple[int, str]:
    poison(number)
    return pretrain_in_rank(rank, world_size, config, *overrides)


def test_a_run_ends_where_it_is_told_to(world: World, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "training": {"train_steps": STEPS},
        "checkpoint": {"directory": str(tmp_path / "checkpoints"), "save_every_steps": 1, "keep_last": 1},
    }
    config = make_run(world, tmp_path, **sections)
    numbers = numbers_by_step(world, config)
    guilty = sample_with_image(world, numbers, step=4)
    first = next(step for step, held in enumerate(numbers, 1) if guilty in held)
    file = write_toml(config, tmp_path / "run.toml")
    ((code, said),) = run_ranks(1, pretrain_poisoned, file, guilty, 'training.on_bad_step="stop"')
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 5 and f"step {first}: loss and gradient norm not finite" in line and "bad_steps.jsonl" in line
    assert saved_steps(config) == [f"step_{first - 1:08d}"]
    assert [told["action"] for told in bad_steps(config)] == ["stopped"]
    ((code, _),) = run_ranks(1, pretrain_poisoned, file, None)  # the machine is mended
    assert code == 0 and saved_steps(config) == [f"step_{STEPS:08d}"]
    assert not any(record["skipped_steps"] for record in records(config, "train")[first:])


def test_a_learning_rate_without_measure_ends_the_run_and_leaves_finite_checkpoints(
    world: World, tmp_path: Path
) -> None:
    config = make_run(
        world,
        tmp_path,
        training={"train_steps": 60, "max_bad_steps_in_a_row": 2},
        optimizer={"lr": 1e6, "warmup_steps": 0},
        checkpoint={"directory": str(tmp_path / "checkpoints"), "save_every_steps": 1, "keep_last": 1},
    )
    ((code, said),) = run_ranks(1, pretrain_in_rank, write_toml(config, tmp_path / "run.toml"))
    assert code == 5, said
    # Those from before the first bad step are there still.
    first = bad_steps(config)[0]["step"]
    saved = saved_steps(config)
    assert f"step_{first - 1:08d}" in saved and len(bad_steps(config)) == 3
    for name in saved:
        weights = read_whole_checkpoint(Path(config.checkpoint.directory) / name)[1]
        assert all(weight.isfinite().all() for weight in weights.values())
    assert "NaN" not in (Path(config.logging.directory) / "metrics.jsonl").read_text()
