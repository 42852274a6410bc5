"""The study's command from scenes to report, at a size that says nothing but that it works."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PAGE = "# Study\n\n<!-- f: written by tools/study/run.py -->\nyesterday\n<!-- end of f -->\n\nA paragraph.\n"


def study(folder: Path, *options: str) -> str:
    """What the command prints."""
    command = [sys.executable, "tools/study/run.py", "f", "--scale", "rehearsal", "--seeds", "2"]
    done = subprocess.run(
        [*command, "--folder", str(folder / "runs"), "--docs", str(folder), *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_study_trains_goes_on_and_reports(tmp_path: Path) -> None:
    (tmp_path / "study.md").write_text(PAGE)
    printed = study(tmp_path)
    assert "4 runs, 4 to do" in printed
    page = (tmp_path / "study.md").read_text()
    assert "yesterday" not in page and page.endswith("<!-- end of f -->\n\nA paragraph.\n")
    assert "| copied | " in page and "| random | " in page
    assert (tmp_path / "study" / "f.svg").read_text().startswith("<?xml")

    places = sorted((tmp_path / "runs" / "rehearsal" / "runs").iterdir())
    results = {place.name: json.loads((place / "result.json").read_text()) for place in places}
    assert len({result["points"][-1]["loss"] for result in results.values()}) == 4
    shutil.rmtree(places[0])
    printed = study(tmp_path)
    assert "4 runs, 1 to do" in printed
    again = json.loads((places[0] / "result.json").read_text())
    assert again == results[places[0].name]
    assert (tmp_path / "study.md").read_text() == page
    assert "to do" not in study(tmp_path, "--report")
    assert "Learning rates" not in page


@pytest.mark.slow
def test_a_study_takes_each_arm_at_its_best_learning_rate(tmp_path: Path) -> None:
    (tmp_path / "study.md").write_text(PAGE)
    study(tmp_path)
    assert "8 runs, 4 to do" in study(tmp_path, "--rates", "1e-3", "2e-3")
    assert "Learning rates, for each arm the best of 0.001, 0.002: copied 0.00" in (tmp_path / "study.md").read_text()
