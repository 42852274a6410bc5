"""The house rules hold for every module, and the checker that says so catches what it should."""

import pytest

from tests.house import (
    IMPORT_TABLE,
    PACKAGE,
    REPOSITORY,
    area_of,
    check_import,
    check_package,
    check_script,
    check_source,
    find_circle,
    render_import_table,
)

DOC = '"""Docstring."""\n'


def test_package_keeps_the_rules() -> None:
    assert check_package() == []


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert find_circle() == []


@pytest.mark.parametrize("folder", ["tools", "examples", "tests"])
def test_scripts_swallow_no_import_error(folder: str) -> None:
    problems = []
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        problems += check_script(path.read_text(encoding="utf-8"), path.relative_to(REPOSITORY).as_posix())
    assert problems == []


def test_importing_a_script_does_nothing() -> None:
    """Spawned workers, such as those of core's checkpoint writer, import the main module again: without its guard a
    script would launch itself in each of them.
    """
    paths = [path for folder in (PACKAGE, "tools", "examples") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    scripts = [path for path in paths if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")]
    assert {path.name for path in scripts} >= {"cli.py", "pretrain.py", "run.py", "layouts.py"}
    assert [problem for path in paths for problem in check_import(path.read_text(encoding="utf-8"), path.name)] == []


@pytest.mark.parametrize("body", ["main()", "if True:\n    main()", "raise SystemExit(main())"])
def test_checker_catches_work_at_import(body: str) -> None:
    (problem,) = check_import(f"def main(): pass\n{body}\n", "run.py")
    assert problem.startswith("run.py:2: runs when imported")


def test_contributing_carries_the_import_table() -> None:
    assert render_import_table() in (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_folder_is_a_package_with_a_row() -> None:
    folders = {path.parent for path in (REPOSITORY / PACKAGE).rglob("*.py")}
    for folder in folders:
        name = folder.relative_to(REPOSITORY / PACKAGE).as_posix()
        assert name == "." or area_of(name) in IMPORT_TABLE
        # Exported files are copied as they are; all others must be found by setup.py's find_packages.
        assert name == "hf/remote_code" or (folder / "__init__.py").is_file(), f"{folder} has no __init__.py"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("config/x.py", "import torch", "config may not import torch"),
        ("config/x.py", "import numpy as np", "config may not import numpy"),
        ("config/x.py", "from navil_megatron.runtime.session import Session", "config may not import runtime"),
        ("layers/x.py", "from navil_megatron.kernels import provider", "layers may not import kernels"),
        ("layers/x.py", "import navil_megatron.models.build", "layers may not import models"),
        ("models/x.py", "def f():\n    from navil_megatron.data.types import Microbatch", "models may not import data"),
        ("data/x.py", "import megatron.core", "data may not import megatron.core"),
        ("data/x.py", "import torch.distributed as dist", "data may not import torch.distributed"),
        ("data/x.py", "from torch import distributed", "data may not import torch.distributed"),
        ("data/x.py", "import torch\ntorch.distributed.barrier()", "data may not use torch.distributed"),
        ("data/loader.py", "import nvidia.dali", "nvidia.dali is imported only in data/dali_decode.py"),
        ("training/x.py", "from navil_megatron.hf import export", "training may not import hf"),
        ("hf/x.py", "import megatron.core.parallel_state", "hf may not import megatron.core.parallel_state"),
        ("hf/x.py", "from navil_megatron.data.types import Microbatch", "hf may not import data"),
        (
            "hf/remote_code/x.py",
            "from navil_megatron.config.model import ModelConfig",
            "remote_code may not import config",
        ),
        ("pretrain.py", "import navil_megatron.hf.export", "pretrain.py may not import hf"),
        ("layers/x.py", "import apex", "apex is imported only in kernels"),
        (
            "models/x.py",
            "from transformer_engine.pytorch import Linear",
            "transformer_engine is imported only in kernels",
        ),
        ("models/x.py", "import importlib\nimportlib.import_module('apex.amp')", "apex is imported only in kernels"),
        ("kernels/x.py", "import torch\ntorch.cuda.synchronize()", "torch.cuda is named only in runtime"),
        ("layers/x.py", "from torch import cuda", "torch.cuda is imported only in runtime"),
        ("layers/x.py", "from torch.cuda.amp import autocast", "torch.cuda is imported only in runtime"),
        ("data/x.py", "import os\nos.replace('a', 'b')", "os.replace is named only in files"),
        ("hf/x.py", "from os import fsync", "os.fsync is imported only in files"),
        (
            "data/x.py",
            "from concurrent.futures import Future, ProcessPoolExecutor",
            "concurrent.futures.ProcessPoolExecutor is imported only in files",
        ),
        ("training/x.py", "backend = 'nccl'", '"nccl" is named only in runtime'),
        ("training/x.py", "backend = 'cpu:gloo,cuda:other'", '"gloo" is named only in runtime'),
        ("runtime/x.py", "try:\n    import torch\nexcept ImportError:\n    torch = None", "ImportError is swallowed"),
        (
            "runtime/x.py",
            "try:\n    pass\nexcept (OSError, ModuleNotFoundError):\n    pass",
            "ModuleNotFoundError is swallowed",
        ),
        (
            "runtime/x.py",
            "import contextlib\nwith contextlib.suppress(ImportError):\n    pass",
            "ImportError is swallowed",
        ),
        ("training/x.py", "print('hello')", "print() only in cli.py"),
        ("training/x.py", "from . import loop", "relative import"),
        ("training/x.py", "from navil_megatron.config.load import NaViLConfig", "NaViLConfig is not defined in"),
        ("training/x.py", "from navil_megatron.config import ConfigError", "ConfigError is not defined in"),
        ("layers/utils.py", "", "is called utils"),
        ("metrics/x.py", "", "metrics has no row in IMPORT_TABLE"),
    ],
)
def test_checker_catches(path: str, body: str, message: str) -> None:
    problems = check_source(DOC + body + "\n", path)
    assert any(message in problem for problem in problems), problems


def test_checker_wants_a_module_docstring() -> None:
    assert check_source("import math\n", "layers/x.py") == ["layers/x.py:1: has no module docstring"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("config/x.py", "from navil_megatron.config.errors import ConfigError"),
        ("runtime/x.py", "import torch\ntorch.cuda.synchronize()\nbackend = 'nccl'"),
        ("models/x.py", "from navil_megatron.config import model\nfrom megatron.core import tensor_parallel"),
        ("training/x.py", "'''gloo in a docstring'''\nmessage = 'runs on gloo ranks'"),
        ("hf/remote_code/x.py", "from .configuration_navil import NaViLConfig"),
        ("cli.py", "print('hello')\nfrom navil_megatron.verbs.verb import Verb"),
        ("kernels/x.py", "import transformer_engine.pytorch as te"),
        ("data/dali_decode.py", "import nvidia.dali.experimental.dynamic as ndd"),
    ],
)
def test_checker_lets_pass(path: str, body: str) -> None:
    assert check_source(DOC + body + "\n", path) == []


def test_checker_names_the_line() -> None:
    assert check_source(DOC + "\n\nimport torch\n", "config/x.py") == ["config/x.py:4: config may not import torch"]


def test_script_check() -> None:
    assert check_script("try:\n    import x\nexcept ImportError:\n    x = None\n", "tools/x.py") == [
        "tools/x.py:3: ImportError is swallowed; choose by config and let a missing package fail"
    ]
