"""The locks say what setup.py admits, agree with each other, and name no machine."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from navil_megatron.cli import VERBS
from navil_megatron.doctor import read_requirements, satisfies
from tests.house import REPOSITORY
from tools.test_versions import BOUNDED, CORE

LOCKS = REPOSITORY / "requirements"
PYTHONS = ("py312", "py313")


def locked(name: str) -> dict[str, str]:
    """Distribution -> its version in a lock; every one has hashes."""
    text = (LOCKS / f"{name}.txt").read_text()
    found = re.findall(r"^([\w.-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    assert len(found) == len(re.findall(r"^[^#\s]", text, re.MULTILINE))
    return dict(found)


@pytest.mark.parametrize("python", PYTHONS)
def test_one_environment_can_hold_every_set(python: str) -> None:
    everything = locked(f"peers-{python}").items()
    for name in ("quickstart", "recipe-small", "test"):
        assert locked(f"{name}-{python}").items() <= everything
    shared = locked(f"docs-{python}").keys() & dict(everything).keys()
    assert {(package, locked(f"docs-{python}")[package]) for package in shared} <= everything
    assert locked(f"quickstart-{python}").items() < locked(f"test-{python}").items()
    assert locked(f"quickstart-{python}").items() < locked(f"recipe-small-{python}").items()


@pytest.mark.parametrize("name", [path.stem for path in sorted(LOCKS.glob("*-py3*.txt"))])
def test_locked_versions_are_within_the_bounds(name: str) -> None:
    versions = locked(name)
    needed = {wanted.name for wanted in read_requirements()[1].values() if not wanted.extra}
    # The image has the torch of its base, the engine lies beside the test set, make docs imports nothing of ours.
    elsewhere = {"image": {"torch"}, "engine": needed, "docs": needed - versions.keys()}.get(
        name.partition("-")[0], set()
    )
    assert needed - set(versions) == elsewhere
    for wanted in read_requirements()[1].values():
        if wanted.name in versions:
            assert satisfies(versions[wanted.name], wanted.bounds), wanted
    assert "://" not in (LOCKS / f"{name}.txt").read_text()


@pytest.mark.parametrize("python", PYTHONS)
def test_each_set_holds_its_extras_and_no_more(python: str) -> None:
    extras: dict[str, set[str]] = {}
    for wanted in read_requirements()[1].values():
        extras.setdefault(wanted.extra, set()).add(wanted.name)
    assert extras["quickstart"] <= set(locked(f"quickstart-{python}"))
    assert extras["test"] | extras["evaluate"] | extras["wandb"] | extras["dali"] <= set(locked(f"test-{python}"))
    assert extras["peers"] | extras["smollm2"] <= set(locked(f"peers-{python}"))
    for name in ("dali", "evaluate", "parquet", "peers", "smollm2", "test", "wandb"):
        assert not extras[name] & set(locked(f"quickstart-{python}"))


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", ["quickstart", "recipe-small"])
def test_an_examples_set_holds_what_its_verbs_need(name: str, python: str) -> None:
    scripts = (REPOSITORY / "examples" / name.replace("-", "_")).glob("*.py")
    called = [words for path in scripts for words in re.findall(r'navil(?:_here)?\("([a-z]+)"', path.read_text())]
    assert "convert" in called
    extras = {verb.needs.name for verb in VERBS if verb.needs and verb.words.split()[0] in called}
    needed = {wanted.name for wanted in read_requirements()[1].values() if wanted.extra in extras}
    assert needed <= set(locked(f"{name}-{python}"))


@pytest.mark.parametrize("python", PYTHONS)
def test_the_engine_lies_beside_the_test_set_with_the_source_of_its_version(python: str) -> None:
    engine = locked(f"engine-{python}")
    assert not engine.keys() & locked(f"test-{python}").keys()
    assert locked("engine-source") == {"transformer-engine-torch": engine["transformer-engine"]}


def test_the_core_of_the_suite_is_there_and_every_bound_has_two_ends() -> None:
    for test in CORE:
        path, _, name = test.partition("::")
        assert (REPOSITORY / path).exists(), test
        assert name.partition("[")[0] in (REPOSITORY / path).read_text() if name else True
    for name in BOUNDED:
        assert re.fullmatch(r">=[\d.]+,<[\d.]+", read_requirements()[1][name].bounds)


@pytest.mark.parametrize(("name", "line"), [("test", "is no virtual environment"), ("tests", "found the set 'tests'")])
def test_an_environment_is_not_made_over_other_files(name: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").touch()
    command = [str(REPOSITORY / "tools" / "make_venv.sh"), name]
    environment = os.environ | {"VENV": str(tmp_path / "folder")}
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert made.stderr.startswith("error: ") and line in made.stderr
    assert (tmp_path / "folder" / "thesis.tex").exists()


def test_bounds_that_are_told_are_those_of_setup() -> None:
    bounds = {wanted.name: wanted.bounds for wanted in read_requirements()[1].values()}
    told = []
    for path in [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("navil_megatron/**/*.py")]:
        told += re.findall(r'"([\w-]+)(?:\[\w+\])?(>=[\d.]+,<[\d.]+)"', path.read_text())
    assert {name for name, _ in told} >= {"nvidia-dali-cuda130", "transformer-engine"}
    assert [(name, found) for name, found in told if bounds[name] != found] == []
