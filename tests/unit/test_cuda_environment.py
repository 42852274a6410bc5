"""What CUDA reads when it starts is set before any library that could start it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.unit.config_examples import EXAMPLE_TOML

STOPS_AT_TORCH = """
import os, sys


class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.write(1, os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "not set").encode())
            os._exit(0)


sys.meta_path.insert(0, Watch())
"""
"""A sitecustomize: the first import of torch, in whatever process, ends it and tells what is set by then."""

ENTRIES = {
    "torchrun's child": ("-m", "navil_megatron.pretrain", "run.toml"),
    "verb train": ("-m", "navil_megatron.cli", "train", "run.toml"),
    "benchmarks": (str(REPOSITORY / "tools" / "bench" / "gpu.py"),),
}


def at_first_import_of_torch(entry: str, folder: Path, **environment: str) -> str:
    (folder / "sitecustomize.py").write_text(STOPS_AT_TORCH)
    (folder / "run.toml").write_text(EXAMPLE_TOML)
    for path in ("tokenizer/tokenizer.json", "shards/train.index"):  # looked for before, and opened after
        (folder / path).parent.mkdir()
        (folder / path).touch()
    around = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
    environment |= {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}
    done = subprocess.run(
        [sys.executable, *ENTRIES[entry]], cwd=folder, env=around | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("entry", ENTRIES)
def test_one_queue_for_kernels_and_collectives(entry: str, tmp_path: Path) -> None:
    assert at_first_import_of_torch(entry, tmp_path) == "1"


def test_what_the_user_set_stands(tmp_path: Path) -> None:
    found = at_first_import_of_torch("torchrun's child", tmp_path, CUDA_DEVICE_MAX_CONNECTIONS="8")
    assert found == "8"
