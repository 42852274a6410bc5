"""``navil-megatron data show``: the picture of a step's rows, from a config."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from navil_megatron.cli import main
from navil_megatron.config.errors import EXIT_CODE
from navil_megatron.config.evaluation import EvaluationConfig
from navil_megatron.config.load import load_config
from navil_megatron.data.loader import TrainLoader
from navil_megatron.data.types import DataPlace
from tests.e2e.runs import write_toml
from tests.unit.data_examples import make_config, write_samples


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("show")
    config = make_config(folder, write_samples(folder, "train", 30))
    return write_toml(replace(config, evaluation=EvaluationConfig()), folder / "run.toml")


def test_it_shows_what_a_run_is_given(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.png"
    words = ["--step", "5", "--first-row", "2", "--rows", "3", "--output", str(output), "--json"]
    assert main(["data", "show", str(run_file), "training.seed=9", *words]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    loader = TrainLoader(load_config(run_file, ["training.seed=9"]), DataPlace(is_first_stage=False), start_step=5)
    rows = next(loader).microbatches[2:5]
    loader.close()
    assert report["samples"] == sum(len(row.samples) for row in rows)
    assert (report["rows"], report["failed_samples"], report["output"]) == (3, 0, str(output))
    with Image.open(output) as page:
        assert page.width > 1000 and page.height > 300


def test_a_row_that_is_not_there_is_one_line(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--first-row", "8", "--output", str(tmp_path / "rows.png")]
    assert main(["data", "show", str(run_file), *words]) == EXIT_CODE
    assert capsys.readouterr().err == "error: row 8: a global batch has 8 rows; count from 0\n"
    assert not (tmp_path / "rows.png").exists()
