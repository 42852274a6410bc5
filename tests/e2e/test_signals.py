"""Stopping and going on as a cluster does it: real processes, a real SIGTERM, torchrun."""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from navil_megatron.config.run import NaViLConfig
from tests.e2e.runs import World, error_lines, make_run, records, saved_steps, start, train_in_rank, write_toml
from tests.ranks import run_ranks
from tests.whole_checkpoint import read_whole_checkpoint

ENDLESS = 100_000
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "navil_megatron.pretrain")


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A command that does not outlive the test, nor do its ranks: they get the signal that lets them leave."""
    process = start(*words)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)


def stop_in_the_middle(process: subprocess.Popen[str], config: NaViLConfig, after_step: int) -> str:
    """Sends SIGTERM once a step is recorded; gives stderr when the process is gone."""
    while not any(record["step"] >= after_step for record in records(config, "train")):
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=60)[1]


def test_sigterm_saves_and_the_next_start_goes_on(world: World, tmp_path: Path) -> None:
    config = make_run(
        world,
        tmp_path / "stopped",
        parallel={"tp": 2, "sequence_parallel": True},
        training={"train_steps": ENDLESS},
        precision={"type": "bf16"},
    )
    command = ("-m", "navil_megatron.cli", "train", str(write_toml(config, tmp_path / "run.toml")), "--nproc", "2")
    with started(*command) as process:
        stderr = stop_in_the_middle(process, config, after_step=2)
        assert process.returncode == 0, stderr
    assert error_lines(stderr) == []
    stopped_at = records(config, "train")[-1]["step"]
    assert f"stopped on request at step {stopped_at} of {ENDLESS}" in stderr
    assert saved_steps(config) == [f"step_{stopped_at:08d}"]

    last = stopped_at + 2
    with started(*command, f"training.train_steps={last}") as process:
        stderr = process.communicate(timeout=120)[1]
        assert process.returncode == 0, stderr
    assert [record["step"] for record in records(config, "train")] == list(range(1, last + 1))
    assert saved_steps(config) == [f"step_{stopped_at:08d}", f"step_{last:08d}"]

    # Stopped or not, and by whichever launcher: the same losses and the same bits.
    straight = make_run(
        world,
        tmp_path / "straight",
        parallel={"tp": 2, "sequence_parallel": True},
        training={"train_steps": last},
        precision={"type": "bf16"},
    )
    run_ranks(2, train_in_rank, straight)
    for name in ("loss", "grad_norm", "consumed_samples"):
        assert [r[name] for r in records(config, "train")] == [r[name] for r in records(straight, "train")], name
    weights = [read_whole_checkpoint(Path(run.checkpoint.directory))[1] for run in (config, straight)]
    torch.testing.assert_close(*weights, rtol=0.0, atol=0.0)


@pytest.mark.slow
def test_torchrun_starts_stops_and_goes_on(world: World, tmp_path: Path) -> None:
    config = make_run(world, tmp_path, training={"train_steps": ENDLESS})
    path = str(write_toml(config, tmp_path / "run.toml"))
    with started(*TORCHRUN, path) as process:
        stderr = stop_in_the_middle(process, config, after_step=2)
    # torchrun's agent passes the signal on, waits, and exits with 1 whatever its ranks return; the rank saved and left.
    assert process.returncode == 1
    assert "stopped on request at step" in stderr
    (saved,) = saved_steps(config)
    stopped_at = records(config, "train")[-1]["step"]
    assert saved == f"step_{stopped_at:08d}"
    with started(*TORCHRUN, path, f"training.train_steps={stopped_at + 1}") as process:
        stderr = process.communicate(timeout=120)[1]
        assert process.returncode == 0, stderr
    assert records(config, "train")[-1]["step"] == stopped_at + 1
