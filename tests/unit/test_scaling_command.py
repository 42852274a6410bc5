"""The scaling verbs as a user meets them: reports, files, pictures, and one line for each thing that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from navil_megatron.cli import main
from navil_megatron.scaling.load import load_study
from tests.unit.scaling_examples import additive, make_study, saturating, write_lines

GOOD = {"llm_parameters": "1B", "encoder_parameters": 1e8, "samples": 1e6, "validation_loss": 1.5}


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON report of a scaling verb that must succeed."""
    assert main(["scaling", *arguments, "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return report


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The error lines of a scaling verb that must exit with 2."""
    assert main(["scaling", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ") for line in lines]


def write(path: Path, *lines: object) -> str:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text + "\n", "utf-8")
    return str(path)


def test_recommend_from_the_papers_curves(capsys: pytest.CaptureFixture[str]) -> None:
    report = told(capsys, "recommend", "--llm", "1.8B")
    assert report["encoder_parameters"] == 600_000_000
    assert (report["depth"], report["width"], report["heads"]) == (24, 1472, 23)
    assert report["interval"] == [424_264_069, 848_528_137]
    assert report["line"]["points"] == 3
    assert main(["scaling", "recommend", "--llm", "8B"]) == 0
    assert "LLM 8B: encoder of 1.3B" in capsys.readouterr().out


def test_another_curves_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other sizes, in falling order, with a value that could not be read and a repeated size."""
    file = tmp_path / "curves.json"
    curves = {
        "13B": {"enc_M": [1600, 800, 400, 200, 100], "50M": [0.7, 0.702, 0.75, 0.8, None]},
        "1B": {"enc_M": [100, 200, 200, 400], "50M": [1.2, 1.101, 1.099, 1.098]},
    }
    file.write_text(json.dumps({"fig6_encoder_scaling": curves}), "utf-8")
    assert told(capsys, "recommend", "--curves", str(file), "--llm", "13B")["encoder_parameters"] == 800_000_000
    report = told(capsys, "recommend", "--curves", str(file), "--llm", "1B")
    assert report["encoder_parameters"] == 200_000_000
    assert report["optima"][0]["seeds"] == [1, 2, 1]
    assert report["optima"][0]["losses"][1] == pytest.approx(1.1)


def test_an_optimum_at_an_edge_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study(saturating(0.5, 0.4), (100e9,), [75e6, 150e6, 300e6])
    file = str(write_lines(study, tmp_path / "edge.jsonl"))
    report = told(capsys, "recommend", file, "--llm", "100B")
    assert (report["relation"], report["encoder_parameters"]) == ("at least", 300_000_000)
    assert report["interval"][1] is None
    assert main(["scaling", "recommend", file, "--llm", "100B"]) == 0
    assert "encoder of at least 300M" in capsys.readouterr().out


def test_fit_reports_every_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = (15e6, 30e6, 60e6, 120e6, 240e6)
    study = make_study(additive(), (1e9,), (300e6,), data, noise=0.001)
    file = str(write_lines(study, tmp_path / "study.jsonl"))
    report = told(capsys, "fit", file)
    assert report["axes"] == ["data"]
    assert set(report["fits"]) == {"log-linear", "power", "power-irreducible"}
    for fit in report["fits"].values():
        assert set(fit["parameters"]) == set(fit["intervals"])
        assert all(low <= fit["parameters"][name] <= high for name, (low, high) in fit["intervals"].items())
    assert report == told(capsys, "fit", file)
    assert main(["scaling", "fit", file, "--form", "power"]) == 0
    assert "exponent_D" in capsys.readouterr().out


def test_fit_refuses_what_points_are_too_few_for(capsys: pytest.CaptureFixture[str]) -> None:
    report = told(capsys, "fit", "--encoder", "600M", "--data", "120M")
    assert "needs at least 4 points, found 3" in report["refused"]["power-irreducible"]
    assert report["inconsistencies"][0]["figure_6_loss"] == 0.678
    (line,) = refused(capsys, "fit", "--encoder", "600M", "--data", "120M", "--form", "power-irreducible")
    assert line == "power-irreducible over llm needs at least 4 points, found 3; add runs"


def test_plan_sweep_buys_within_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "runs.jsonl"
    report = told(capsys, "plan-sweep", "--llm", "8B", "--gpu-hours", "9000", "--output", str(output))
    hours = [run["gpu_hours"] for run in report["runs"]]
    assert sum(hours) == pytest.approx(report["total_gpu_hours"], abs=0.01 * len(hours))
    assert report["total_gpu_hours"] <= 9000
    assert [json.loads(line) for line in output.read_text("utf-8").splitlines()] == report["runs"]
    assert report["assumptions"] == {"tflops": 989.0, "mfu": 0.4, "visual_tokens": 256, "text_tokens": 64}
    more = told(capsys, "plan-sweep", "--llm", "8B", "--gpu-hours", "30000")
    assert more["factor_after"] <= report["factor_after"]
    (line,) = refused(capsys, "plan-sweep", "--llm", "8B", "--gpu-hours", "1")
    assert "found a budget of 1 GPU-hours, expected at least" in line


def test_plot_writes_the_same_picture_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = []
    for name in ("a.svg", "b.svg"):
        told(capsys, "plot", "--output", str(tmp_path / name), "--llm", "8B")
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(b"<?xml")
    told(capsys, "plot", "--output", str(tmp_path / "c.png"))
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "no JSON"),
        ([1], "found list, expected an object"),
        ({**GOOD, "encoder_parameter": 1}, "unknown field encoder_parameter; did you mean encoder_parameters?"),
        ({k: v for k, v in GOOD.items() if k != "llm_parameters"}, "llm_parameters is missing"),
        ({k: v for k, v in GOOD.items() if k != "samples"}, "expected one of samples and tokens, found neither"),
        ({**GOOD, "tokens": 5}, "expected one of samples and tokens, found samples and tokens"),
        ({**GOOD, "validation_loss": None}, "validation_loss: found None"),
        ({**GOOD, "validation_loss": -1}, "validation_loss: found -1"),
        ({**GOOD, "validation_loss": float("nan")}, "validation_loss: found nan"),
        ({**GOOD, "validation_loss": "1.5"}, "validation_loss: found '1.5'"),
        ({**GOOD, "llm_parameters": 1.8}, "a unit may be missing"),
        ({**GOOD, "llm_parameters": True}, "llm_parameters: found True"),
        ({**GOOD, "seed": 1.5}, "seed: found 1.5, expected a whole number"),
        ({**GOOD, "depth": 0}, "depth: found 0, expected a whole number"),
        ({**GOOD, "width": 100, "heads": 3}, "heads = 3 does not divide width = 100"),
        ({**GOOD, "tags": "a"}, "tags: found 'a', expected a list of texts"),
    ],
)
def test_bad_lines(line: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "study.jsonl", GOOD, line, GOOD)
    (problem,) = refused(capsys, "fit", file)
    assert problem.startswith(f"{file}:2: ") and message in problem


def test_all_problems_of_a_file_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = {"tokens" if key == "samples" else key: value for key, value in GOOD.items()}
    file = write(tmp_path / "study.jsonl", GOOD, "{oops", tokens, {**GOOD, "seed": -1})
    lines = refused(capsys, "fit", file)
    assert [line.split(": ")[0] for line in lines[:2]] == [f"{file}:2", f"{file}:4"]
    assert lines[2] == f"{file}:1 counts samples and {file}:3 tokens; use one of them in a file"


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({"fig1": {}}, "fig6_encoder_scaling is missing"),
        ({"fig6_encoder_scaling": {}}, "holds no curve"),
        ({"fig6_encoder_scaling": {"2B": {"100M": [1.0]}}}, "2B.enc_M is missing"),
        ({"fig6_encoder_scaling": {"2B": {"enc_M": [75, 150], "100M": [1.0]}}}, "found 1 losses for 2 encoder sizes"),
        ({"fig6_encoder_scaling": {"big": {"enc_M": [75], "100M": [1.0]}}}, "big: found 'big'"),
        ({"fig6_encoder_scaling": {"2B": {"enc_M": [75], "100M": [0]}}}, "2B.100M: found 0"),
    ],
)
def test_bad_curves(curves: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (problem,) = refused(capsys, "recommend", "--curves", write(tmp_path / "c.json", curves), "--llm", "8B")
    assert message in problem


def test_files_that_are_no_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write(tmp_path / "empty.jsonl")
    assert refused(capsys, "fit", empty) == [f"{empty} holds no runs; expected one JSON object a line"]
    assert "cannot read" in refused(capsys, "fit", str(tmp_path / "none.jsonl"))[0]
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in refused(capsys, "fit", str(tmp_path / "binary"))[0]
    one = write(tmp_path / "one.jsonl", GOOD)
    assert "nothing to fit" in refused(capsys, "fit", one)[0]
    assert "no LLM with an encoder and one of twice its size" in refused(capsys, "recommend", one, "--llm", "1B")[0]
    assert "found both" in refused(capsys, "fit", one, "--curves", one)[0]
    assert ".svg or .png" in refused(capsys, "plot", "--output", "study.pdf")[0]


def test_a_line_written_twice_counts_once(tmp_path: Path) -> None:
    line = {**GOOD, "seed": 1}
    study = load_study(Path(write(tmp_path / "study.jsonl", line, line, {**line, "seed": 2}, GOOD, GOOD)))
    assert len(study.runs) == 4
    assert "study.jsonl:2 repeats" in study.warnings[0]


@pytest.mark.parametrize("arguments", [["recommend", "--llm", "8"], ["recommend"], ["plan-sweep", "--llm", "8B"], []])
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["scaling", *arguments])
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err
