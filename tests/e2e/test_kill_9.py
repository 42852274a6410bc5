"""``kill -9`` of all ranks while checkpoints and copies are written beside the training: the run goes on as if nothing
had been.

pytest tests/e2e/test_kill_9.py --kills 100
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from navil_megatron.config.run import NaViLConfig
from navil_megatron.files.atomic_file import PARTIAL
from navil_megatron.files.checkpoint_folder import complete_checkpoints, step_of
from navil_megatron.training.loop import train
from tests.e2e.runs import World, make_run, records, saved_steps, train_in_rank
from tests.ranks import RankFailure, run_ranks, start_session
from tests.whole_checkpoint import read_whole_checkpoint

STEPS_OF_A_LIFE, MOST_SECONDS = 4, 0.05


def _until_killed(rank: int, world_size: int, config: NaViLConfig, until_step: int, seconds: float) -> None:
    """Trains until all ranks are killed at once, so long after a step is recorded."""
    with start_session(rank, world_size, config) as session:
        ranks = [0] * world_size
        torch.distributed.all_gather_object(ranks, os.getpid())
        if rank == 0:
            threading.Thread(target=_kill, args=(ranks, config, until_step, seconds), daemon=True).start()
        train(config, session)


def _kill(ranks: list[int], config: NaViLConfig, until_step: int, seconds: float) -> None:
    while not any(record["step"] >= until_step for record in records(config, "train")):
        time.sleep(0.005)
    time.sleep(seconds)
    for process in reversed(ranks):  # this one last
        os.kill(process, signal.SIGKILL)


def _goes_on_from_a_copy(folder: Path) -> bool:
    """Whether the next start does: the two ranks' parts are there, and newer than any checkpoint."""
    checkpoints = complete_checkpoints(folder / "killed" / "checkpoints")
    newest = max((step_of(path) or 0 for path in checkpoints), default=0)
    copies = [path for path in folder.glob("local/*/step_*") if len(list(path.glob("rank_*[0-9]"))) == 2]
    return any(int(path.name[5:13]) > newest for path in copies)


@pytest.mark.parametrize(
    ("layout", "copy_every"),
    [
        pytest.param({"tp": 2, "sequence_parallel": True}, 1, id="tensor"),
        pytest.param({}, 3, id="data", marks=pytest.mark.slow),  # more starts from checkpoints
    ],
)
def test_a_run_that_is_killed_again_and_again(
    world: World,
    tmp_path: Path,
    layout: dict[str, int],
    copy_every: int,
    pytestconfig: pytest.Config,
    record_property: Callable[[str, object], None],
) -> None:
    """Saved after nearly every step, as a checkpoint or a copy; bit for bit the undisturbed run."""
    kills, seed = pytestconfig.getoption("kills"), pytestconfig.getoption("seed")
    record_property("faults", kills)
    training = {"train_steps": STEPS_OF_A_LIFE * (kills + 1), "log_every_steps": 1}
    checkpoint = {"directory": str(tmp_path / "killed" / "checkpoints"), "save_every_steps": 2, "async_save": True}
    checkpoint |= {"local_directory": str(tmp_path / "local"), "local_every_steps": copy_every}
    sections = {"parallel": layout, "training": training, "precision": {"type": "bf16"}}
    killed = make_run(world, tmp_path / "killed", checkpoint=checkpoint, **sections)
    moments, under_way, starts = random.Random(seed), 0, list[bool]()
    for number in range(kills):
        step = number * STEPS_OF_A_LIFE + moments.randint(1, STEPS_OF_A_LIFE // 2)
        with pytest.raises(RankFailure, match="the process died") as caught:
            run_ranks(2, _until_killed, killed, step, moments.uniform(0, MOST_SECONDS))
        assert "Timeout" not in str(caught.value)  # killed, and not hung
        partial = [*saved_steps(killed), *(path.name for path in (tmp_path / "local").rglob("rank_*"))]
        under_way += any(name.endswith(PARTIAL) for name in partial)
        starts.append(_goes_on_from_a_copy(tmp_path))
    found = f"of {kills} kills {under_way} came within a write; {sum(starts)} starts from a copy"
    print(found)
    assert under_way >= kills // 4, found
    assert kills < 10 or sum(starts) > 0, found
    run_ranks(2, train_in_rank, killed)

    straight = make_run(world, tmp_path / "straight", **sections)
    run_ranks(2, train_in_rank, straight, timeout=60 + 10 * kills)
    names = ("step", "loss", "grad_norm", "consumed_samples", "consumed_tokens")
    done, expected = ([tuple(r[name] for name in names) for r in records(run, "train")] for run in (killed, straight))
    assert sorted(set(done)) == expected  # a step that is done again gives the same again
    last = training["train_steps"]
    assert saved_steps(killed) == ["run_id", *(f"step_{step:08d}" for step in (last - 2, last))]
    assert list((tmp_path / "local").iterdir()) == []
    weights = [read_whole_checkpoint(Path(run.checkpoint.directory))[1] for run in (killed, straight)]
    torch.testing.assert_close(*weights, rtol=0.0, atol=0.0)
