"""A rank before torch is loaded: what it reads is looked for, and a request to stop is answered."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import REPOSITORY
from tests.unit.config_examples import EXAMPLE_TOML

PROGRAM = """
import os, signal, sys

class Stop:
    "Sends SIGTERM when the first heavy import begins."
    def find_spec(self, name, *_):
        if name == "navil_megatron.checkpoint.run_lock" and "stop" in sys.argv:
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Stop())
from navil_megatron.pretrain import main
code = main([sys.argv[1]])
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A config whose inputs are there."""
    (tmp_path / "run.toml").write_text(EXAMPLE_TOML)
    for name in ("tokenizer", "shards"):
        (tmp_path / name).mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").touch()
    (tmp_path / "shards" / "train.index").touch()
    return tmp_path / "run.toml"


def start(*words: str) -> tuple[int, list[str]]:
    """Exit code and stderr."""
    command = [sys.executable, "-c", PROGRAM, *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr.splitlines()


def test_a_stop_while_starting_is_answered(run_file: Path) -> None:
    assert start(str(run_file), "stop") == (0, ["stopped on request while starting: nothing was trained"])


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("tokenizer/tokenizer.json", "tokenizer cannot be loaded (no tokenizer.json in it)"),
        ("tokenizer", "tokenizer is missing: set data.tokenizer"),
        ("shards/train.index", "train.index cannot be read (No such file or directory): give its path, or make it"),
        ("", "held.index cannot be read"),
        ("", "weights holds no checkpoint"),
    ],
)
def test_what_is_missing_is_told_before_torch_is_loaded(run_file: Path, missing: str, expected: str) -> None:
    if missing:
        path = run_file.parent / missing
        path.rename(path.with_name("elsewhere"))
    elif "held" in expected:
        run_file.write_text(EXAMPLE_TOML + '[evaluation]\nsources = ["held.index"]\nevery_steps = 2\n')
    else:
        run_file.write_text(EXAMPLE_TOML.replace("[checkpoint]", '[checkpoint]\ninitial_weights = "weights"'))
    code, (line,) = start(str(run_file))
    assert code == 2
    assert line.startswith("error: ") and expected in line
