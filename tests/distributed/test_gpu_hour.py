"""The first hour on a GPU runs where none is, at tiny size; whatever a part does, the others run and all is written."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import REPOSITORY
from tools import gpu_hour
from tools.gpu_hour import Part, all_parts, run_parts

ABOUT = {"device": "none", "devices": [], "date": "today", "command": "-", "commit": None, "minutes": 1, "versions": {}}

TWO_TESTS = """
import time

def test_fails():
    assert 1 == 2

def test_hangs():
    time.sleep(600)
"""

DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"])
print("child", child.pid, flush=True)
def hangs_here():
    time.sleep(600)
hangs_here()
"""


def script(name: str, code: str, limit: float = 30, **fields: Any) -> Part:
    return Part(name=name, what="a test of the hour", limit=limit, command=("-c", code), gpus=0, **fields)


def run(folder: Path, *parts: Part, seconds: float = 60) -> dict[str, dict[str, Any]]:
    run_parts(parts, folder, ABOUT, time.monotonic() + seconds)
    return {result["part"]: result for result in json.loads((folder / "summary.json").read_text())["parts"]}


def test_a_failure_stops_nothing_and_leaves_its_traceback(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        script("bad", "def f(): raise ValueError('of the part')\nf()"),
        script("absent", "", needs=("json.no_such_module",)),
        script("good", """print('speed {"tflops": 3.5}')"""),
        script(
            "later", "import json; print(len(json.load(open('{folder}/../summary.json'))['parts']), 'parts so far')"
        ),
    )
    assert {name: result["status"] for name, result in found.items()} == {
        "bad": "failed",
        "absent": "not installed",
        "good": "passed",
        "later": "passed",
    }
    assert found["bad"]["tail"][-1] == "ValueError: of the part" and "in f" in "".join(found["bad"]["tail"])
    assert found["absent"]["why"] == "json.no_such_module"
    assert found["good"]["measurements"] == [{"benchmark": "speed", "tflops": 3.5}]
    # Each summary is written before the next part starts.
    assert (tmp_path / "later" / "output.txt").read_text() == "3 parts so far\n"
    told = (tmp_path / "summary.md").read_text()
    assert "| bad | a test of the hour | failed: exit code 1 |" in told and "ValueError: of the part" in told


def test_tests_that_hang_are_stopped_and_tell_what_had_failed(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text(TWO_TESTS)
    words = ("-m", "pytest", "-v", "-p", "no:cacheprovider", str(tmp_path / "test_two.py"))
    found = run(tmp_path / "out", Part(name="tests", what="two", limit=6, command=words, gpus=0))["tests"]
    assert found["status"] == "stopped" and found["why"] == "at its limit of 6 s; 1 failed"
    assert [name.rpartition("::")[2] for name in found["failed"]] == ["test_fails"]
    told = "\n".join(found["tail"])
    assert "assert 1 == 2" in told and "test_two.py:8: KeyboardInterrupt" in told


def test_what_hears_nothing_is_killed_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_hour, "GRACE_SECONDS", 1.0)
    found = run(tmp_path, script("deaf", DEAF, limit=2))["deaf"]
    assert found["status"] == "stopped"
    assert any("in hangs_here" in line for line in found["tail"])
    child = int(found["tail"][0].removeprefix("child "))
    # Killed, which takes a moment, and perhaps not collected by the machine's first process.
    deadline = time.monotonic() + 30
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_parts_beyond_the_minutes_are_named(tmp_path: Path) -> None:
    found = run(tmp_path, script("one", "import time; time.sleep(600)"), script("two", ""), seconds=21)
    assert found["one"]["status"] == "stopped" and found["one"]["limit_seconds"] <= 21
    assert found["two"]["status"] == "skipped" and found["two"]["why"] == "the 1 minutes were used up"


def test_every_test_for_a_gpu_belongs_to_one_part() -> None:
    files = [[word for word in part.command if word.endswith(".py")] for part in all_parts() if "-m" in part.command]
    assert all(files)
    together = sorted(path for some in files for path in some)
    folders = ("tests/gpu", "tests/engine")
    expected = [path for folder in folders for path in (REPOSITORY / folder).glob("test_*.py")]
    assert together == sorted(path.relative_to(REPOSITORY).as_posix() for path in expected)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "tools/gpu_hour.py", "--rehearse", "--out", str(out)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE
    )
    (folder,) = out.iterdir()
    assert done.returncode == 0, (folder / "summary.md").read_text()
    return folder


@pytest.mark.slow
def test_the_hour_runs_on_a_cpu(rehearsal: Path) -> None:
    summary = json.loads((rehearsal / "summary.json").read_text())
    assert summary["device"] == "rehearsal" and summary["versions"]["torch"] and summary["versions"]["megatron-core"]
    found = {result["part"]: result for result in summary["parts"]}
    assert list(found) == [part.name for part in all_parts()]
    for part in all_parts():
        result = found[part.name]
        if "transformer_engine" in part.needs:
            assert result["status"] in ("not installed", "passed", "skipped")
        elif part.gpus > 1:
            assert result["status"] == "skipped" and result["why"].startswith("needs 2 GPUs, here")
        elif "-m" in part.command:
            assert result["status"] == "skipped" and set(result["tests"]) == {"skipped"}, result
            assert any("needs a CUDA device" in line for line in result["skipped"])
        else:
            assert result["status"] == "passed" and result["measurements"]


@pytest.mark.slow
def test_every_benchmark_for_a_gpu_runs_on_a_cpu(rehearsal: Path) -> None:
    results: dict[str, Any] = {}
    for path in (*rehearsal.glob("step-torch/*.json"), *rehearsal.glob("layers-torch/*.json")):
        report = json.loads(path.read_text())
        assert report["seconds"].keys() == report["results"].keys() and report["errors"] == []
        results |= report["results"]
    assert results.keys() == {"decoder_layers", "encoder", "loss_head", "experts", "whole_step", "profile"}
    assert all(results.values())
    assert all(set(result["ratios"]) == {"feed_forward", "qkv_projection", "decoder"} for result in results["experts"])
    (whole,) = results["whole_step"]
    # Encoder and decoder are counted in one, the decoder alone in the other.
    assert whole["whole"]["tflop"] > whole["decoder_only"]["tflop"] > 0 and whole["ratio"] > 0
    (profile,) = results["profile"]
    assert len(profile["longest_kernels"]) == 10
    assert {"gemm", "attention", "norms_elementwise", "gathers", "communication", "memcpy", "idle"} <= set(
        profile["shares"]
    )
