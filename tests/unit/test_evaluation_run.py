"""``navil-megatron evaluate`` on a small random export: batches, resuming, damaged pictures, the page."""

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from navil_megatron.cli import main
from navil_megatron.config.errors import UserError
from navil_megatron.evaluation.evaluate import Settings, evaluate
from tests.unit.hf_folders import PICTURES, export_example

QUESTIONS = ["What is <b>left</b> of it?", "a red square left of", "a"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_example(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = []
    for number, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": "a red square"})
        rows.append({"image": f"{number}.png", "question": QUESTIONS[number], "answers": ["red"], "id": f"q{number}"})
    rows.append({"images": ["0.png", "2.png"], "question": "same?", "answers": ["no", "nope"]})
    rows.append({"question": "a blue circle", "answers": ["left"]})
    path = tmp_path / "set.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def run(folder: Path, data: Path, output: Path, **settings: Any) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    progress: list[tuple[int, int]] = []
    report = evaluate(folder, data, output, Settings(max_new_tokens=6, **settings), lambda *done: progress.append(done))
    return report, progress


def answers(output: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    return [(row["id"], row["text"]) for row in rows]


def test_a_batch_answers_as_single_samples_do(exported: Path, data: Path, tmp_path: Path) -> None:
    report, progress = run(exported, data, tmp_path / "one", batch_size=1)
    run(exported, data, tmp_path / "three", batch_size=3)
    run(exported, data, tmp_path / "all", batch_size=8)
    found = answers(tmp_path / "one")
    assert found == answers(tmp_path / "three") == answers(tmp_path / "all")
    assert [name for name, _ in found] == ["1", "q0", "3", "q1", "5", "q2", "7", "8"]
    assert len({text for _, text in found}) > 4
    assert progress == [(done, 8) for done in range(9)]
    assert set(report["scores"]["caption"]) == {"num", "cider", "bleu"}
    assert set(report["scores"]["qa"]) == {"num", "exact_match", "anls", "relaxed_accuracy"}
    assert report["num_answered"] == 8
    assert report["damaged"] == []
    assert json.loads((tmp_path / "one" / "report.json").read_text()) == report


def test_a_killed_run_goes_on_where_it_stopped(exported: Path, data: Path, tmp_path: Path) -> None:
    whole, _ = run(exported, data, tmp_path / "whole", batch_size=2)
    run(exported, data, tmp_path / "torn", batch_size=2)
    file = tmp_path / "torn" / "predictions.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]) + lines[4][:-7])
    torn, progress = run(exported, data, tmp_path / "torn", batch_size=2)
    assert progress == [(4, 8), (6, 8), (8, 8)]
    assert file.read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    assert torn["scores"] == whole["scores"]
    _, progress = run(exported, data, tmp_path / "torn", num_worst=1)
    assert progress == [(8, 8)]


def test_answers_of_anything_else_are_refused(exported: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(exported, data, output)
    with pytest.raises(UserError, match="answers of other settings"):
        run(exported, data, output, prompts="plain")
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    (other / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match="answers of other model"):
        run(other, data, output)
    PICTURES[1].save(tmp_path / "0.png")
    with pytest.raises(UserError, match="'1' for other pictures"):
        run(exported, data, output)
    data.write_text(data.read_text() + "\n")
    with pytest.raises(UserError, match="answers of other data"):
        run(exported, data, output)
    (output / "predictions.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"predictions\.jsonl:1 is damaged"):
        run(exported, data, output)


def test_a_damaged_picture_is_named_and_left_out(exported: Path, data: Path, tmp_path: Path) -> None:
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[: len(content) // 2])
    Image.new("RGB", (1, 300)).save(tmp_path / "2.png")
    report, progress = run(exported, data, tmp_path / "out", batch_size=3)
    assert [one["id"] for one in report["damaged"]] == ["3", "q1", "5", "q2", "7"]
    assert "1.png cannot be read as a picture" in report["damaged"][0]["reason"]
    assert "aspect ratio" in report["damaged"][-1]["reason"]
    assert report["num_answered"] == 3
    assert progress[-1] == (8, 8)
    (tmp_path / "1.png").write_bytes(content)  # what is mended is answered by the next run
    report, progress = run(exported, data, tmp_path / "out", batch_size=3)
    assert progress[0] == (3, 8)
    assert report["num_answered"] == 5


def test_nothing_to_answer_is_an_error(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "set.jsonl").write_text(json.dumps({"image": "a.png", "caption": "x"}))
    with pytest.raises(UserError, match=r"none of the 1 samples .* can be answered; '1': .*a\.png"):
        run(exported, tmp_path / "set.jsonl", tmp_path / "out")


def test_the_command_reports_and_writes_a_page(
    exported: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["evaluate", str(exported), str(data), "--output", str(output), "--max-new-tokens", "6"]
    assert main([*arguments, "--worst", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["page"] == str(output / "worst.html")
    page = (output / "worst.html").read_text()
    assert page.count("<article>") == 4
    assert "<b>" not in page
    assert "http" not in page
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    sizes = {Image.open(io.BytesIO(base64.b64decode(content))).size for content in pictures}
    assert sizes <= {image.size for image in PICTURES}
    assert sizes
    assert main(arguments) == 0
    assert "8 of 8 samples answered" in capsys.readouterr().out
    assert main([*arguments, "--prompts", "chat", "--output", str(tmp_path / "turns")]) == 0


def test_bad_rows_are_lines_of_errors(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set.jsonl").write_text("[]\n{}\n")
    assert main(["evaluate", str(exported), str(tmp_path / "set.jsonl"), "--output", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True, True]
    assert not (tmp_path / "out").exists()
