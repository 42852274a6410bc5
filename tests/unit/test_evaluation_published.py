"""The paper's table: as the specification has it, its averages, and what docs/evaluation.md shows."""

import os
import re
from pathlib import Path

import pytest

from navil_megatron.evaluation.published import ELEVEN, FIGURES, GENERAL, QUESTIONS, average, figures_of, render_table
from tests.house import REPOSITORY


def test_the_page_shows_the_figures() -> None:
    assert render_table() in (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_averages_are_the_published_ones() -> None:
    assert len(GENERAL) == len(QUESTIONS) == 7
    assert len(ELEVEN) == 11
    assert average("NaViL-2B", GENERAL) == pytest.approx(67.1, abs=0.05)
    assert average("NaViL-2B", QUESTIONS) == pytest.approx(75.1, abs=0.05)
    assert average("NaViL-2B", ELEVEN) == pytest.approx(68.8, abs=0.05)
    assert average("NaViL-9B", ELEVEN) == pytest.approx(77.0, abs=0.06)
    assert average("InternVL-2.5-2B", GENERAL) == pytest.approx(67.0, abs=0.06)
    assert average("NaViL-9B", GENERAL) is None


def test_every_figure_is_that_of_the_specification() -> None:
    path = Path(os.environ.get("NAVIL_SPEC", REPOSITORY.parent / "shared" / "spec" / "navil.md"))
    if not path.is_file():
        pytest.skip(f"no specification at {path}")
    rows = re.findall(
        r"^\| (NaViL|InternVL|Qwen2|Mono|EVE|SAIL)([^|]*)\|(.*)\|$", path.read_text("utf-8"), re.MULTILINE
    )
    specified = [figures.split("|")[1:] for _, _, figures in rows if len(figures.split("|")) in (8, 12)]
    specified = [[figure.strip() for figure in figures] for figures in specified]
    for model in FIGURES:
        if model.startswith("ours"):
            continue
        found = figures_of(model)
        assert [found[name] for name in ELEVEN] in specified or [found[name] for name in GENERAL] in specified
        assert "-" in found.values() or [found[name] for name in QUESTIONS] in specified
