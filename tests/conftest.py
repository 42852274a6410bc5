"""Fixtures and markers that every test folder shares."""

import gc
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the tests take that say more the longer they run."""
    parser.addoption("--kills", type=int, default=1, help="kills of tests/e2e/test_kill_9.py, for each layout")
    parser.addoption("--seed", type=int, default=20_261_127, help="draws their moments")


def pytest_configure() -> None:
    """What collecting the tests imports stays: looking for garbage among it, then and later, is time lost."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of reference data made with the authors' code; skips the test where it is absent."""
    folder = Path(os.environ.get("NAVIL_GOLDEN_DIR", REPOSITORY.parent / "shared" / "golden"))
    if not (folder / "public" / "cases").is_dir():
        pytest.skip(f"no golden files in {folder}: set NAVIL_GOLDEN_DIR to the folder that holds public/cases")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small disk with some options, where this machine allows it."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "navil-test", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="session", autouse=True)
def _fork_server(request: pytest.FixtureRequest) -> None:
    """Where a test starts ranks, their server is the first of the process."""
    tests = (item for item in request.session.items if isinstance(item, pytest.Function))
    if any("run_ranks" in vars(item.module) and not item.get_closest_marker("gpu") for item in tests):
        from tests.ranks import start_fork_server

        start_fork_server()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A ``gpu`` test skips without CUDA, unless CUDA was promised (``make test-gpu``): then it fails."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if torch.cuda.is_available():
        return
    if os.environ.get("NAVIL_REQUIRE_CUDA") == "1":
        pytest.fail("NAVIL_REQUIRE_CUDA=1, but torch sees no CUDA device", pytrace=False)
    pytest.skip("needs a CUDA device")
