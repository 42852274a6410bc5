"""``navil-megatron data show``: the page or picture of a step's rows, from a config."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from navil_megatron.cli import main
from navil_megatron.config.errors import EXIT_CODE
from navil_megatron.config.evaluation import EvaluationConfig
from navil_megatron.config.load import load_config
from navil_megatron.data.loader import TrainLoader
from navil_megatron.data.shards.source import Source
from navil_megatron.data.show.step import show_step
from navil_megatron.data.types import DataPlace
from tests.e2e.runs import write_toml
from tests.unit.data_examples import damage_image, make_config, write_samples


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
    with Image.open(output) as picture:
        assert picture.width > 1000 and picture.height > 300
    words[words.index(str(output))] = str(output.with_suffix(".html"))
    assert main(["data", "show", str(run_file), "training.seed=9", *words]) == 0
    page = output.with_suffix(".html").read_text(encoding="utf-8")
    assert [page.count(f"<h2>Row {number}: ") for number in range(1, 6)] == [0, 1, 1, 1, 0]
    assert page.count("<article") == report["samples"]


def test_a_row_that_is_not_there_is_one_line(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--first-row", "8", "--output", str(tmp_path / "rows.png")]
    assert main(["data", "show", str(run_file), *words]) == EXIT_CODE
    assert capsys.readouterr().err == "error: row 8: a global batch has 8 rows; count from 0\n"
    assert not (tmp_path / "rows.png").exists()


def test_a_file_that_is_neither_page_nor_picture_is_one_line(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "show", str(run_file), "--output", f"{tmp_path}/rows.gif"]) == EXIT_CODE
    assert capsys.readouterr().err == (
        f"error: --output {tmp_path}/rows.gif: give a page, as rows.html, or bars and images without texts, as "
        "rows.png\n"
    )


def test_a_damaged_image_is_named(run_file: Path, tmp_path: Path) -> None:
    for file in run_file.parent.glob("train*"):
        shutil.copy(file, tmp_path)
    source = Source(tmp_path / "train.index")
    for number in range(30):
        if len(source.index.images_of(number)):
            damage_image(source, number)
    config = load_config(run_file, [f'data.train_sources=[{{index="{tmp_path}/train.index"}}]'])
    report = show_step(config, 0, 0, 2, tmp_path / "rows.html")
    page = (tmp_path / "rows.html").read_text(encoding="utf-8")
    assert report["failed_samples"] == page.count('<p class="failed">') > 0
    assert "blank, and without loss" in page
