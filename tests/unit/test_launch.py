"""launch.py: real ranks of a tiny module; exit codes, environment and signals as a user meets them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from navil_megatron.launch import run_ranks

RANK_MODULE = """
import json, os, signal, sys, time
rank, case = int(os.environ["RANK"]), sys.argv[1]
if case == "environment":
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    with open(os.path.join(sys.argv[2], f"{rank}.json"), "w") as file:
        json.dump({name: os.environ[name] for name in names}, file)
elif case == "user_error":
    sys.exit(2)
elif case == "one_fails" and rank == 1:
    sys.exit(7)
elif case == "one_is_killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
elif case == "stops_late" and rank == 1:
    time.sleep(0.3)
    sys.exit(2)
elif case == "stops_late":
    sys.exit(1)
elif case == "orphan":
    from navil_megatron.launch import end_with_launcher
    end_with_launcher()
    with open(os.path.join(sys.argv[2], f"{rank}.pid"), "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)
elif case == "until_signal":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    open(os.path.join(sys.argv[2], f"ready{rank}"), "w").close()
    signal.pause()
else:
    time.sleep(60)
"""


@pytest.fixture
def ranks_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy_rank.py").write_text(RANK_MODULE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path.cwd()}")
    return tmp_path


def test_ranks_get_what_torchrun_would_set(ranks_folder: Path) -> None:
    assert run_ranks("toy_rank", ["environment", str(ranks_folder)], 2) == 0
    seen = [json.loads((ranks_folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [entry["RANK"] for entry in seen] == [entry["LOCAL_RANK"] for entry in seen] == ["0", "1"]
    assert {entry["WORLD_SIZE"] for entry in seen} == {entry["LOCAL_WORLD_SIZE"] for entry in seen} == {"2"}
    assert seen[0]["MASTER_PORT"] == seen[1]["MASTER_PORT"]


@pytest.mark.parametrize(
    ("case", "status"), [("user_error", 2), ("one_fails", 7), ("one_is_killed", 128 + 9), ("stops_late", 2)]
)
def test_exit_code(ranks_folder: Path, case: str, status: int) -> None:
    # In two of the cases rank 0 would wait for a minute: it is killed once the grace is over.
    assert run_ranks("toy_rank", [case], 2, grace_seconds=1.0) == status


def test_stop_signal_reaches_every_rank(ranks_folder: Path) -> None:
    program = (
        "import sys; from navil_megatron.launch import run_ranks;"
        "sys.exit(run_ranks('toy_rank', ['until_signal', sys.argv[1]], 2))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(ranks_folder)])
    try:
        while not all((ranks_folder / f"ready{rank}").exists() for rank in (0, 1)):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()


OWN = "import sys; from navil_megatron.launch import run_ranks; run_ranks('toy_rank', sys.argv[1:], 2)"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "toy_rank")


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(("-c", OWN), id="own"),
        pytest.param(TORCHRUN, id="torchrun", marks=pytest.mark.slow),
    ],
)
def test_ranks_end_with_a_killed_launcher(ranks_folder: Path, launcher: tuple[str, ...]) -> None:
    stderr = ranks_folder / "stderr"
    with stderr.open("wb") as file:
        process = subprocess.Popen([sys.executable, *launcher, "orphan", str(ranks_folder)], stderr=file)
    notes = [ranks_folder / f"{rank}.pid" for rank in (0, 1)]
    while not all(note.exists() and note.read_text() for note in notes):
        assert process.poll() is None, stderr.read_text()
        time.sleep(0.01)
    ranks = [psutil.Process(int(note.read_text())) for note in notes]
    process.kill()
    process.wait()
    try:
        _, alive = psutil.wait_procs(ranks, timeout=20)
        assert not alive
    finally:
        for rank in ranks:
            if rank.is_running():
                rank.kill()
    assert stderr.read_text().count(f"error: the launcher, process {process.pid}, is gone; its ranks end\n") == 1
