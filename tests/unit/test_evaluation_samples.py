"""The rows of an evaluation set: what is taken, and that every problem is named with its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from navil_megatron.config.errors import ConfigError, UserError
from navil_megatron.evaluation.prompts import content_of, prompt_of
from navil_megatron.evaluation.samples import MAX_PROBLEMS, read_samples
from tests.unit.hf_folders import picture


def written(folder: Path, *rows: Any) -> Path:
    picture(40, 40).save(folder / "a.png")
    path = folder / "set.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_rows_in_order_with_their_tasks(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"image": "a.png", "caption": "a thing"},
        "",
        {"images": ["a.png", "a.png"], "question": "Same?", "answers": ["yes", "Yes"], "id": "q"},
        {"image": "a.png", "question": "Describe it.", "answers": ["noise"], "task": "caption"},
        {"question": "2 + 2?", "answers": ["4"]},
    )
    samples = read_samples(path)
    assert [(one.id, one.task, len(one.images)) for one in samples] == [
        ("1", "caption", 1),
        ("q", "qa", 2),
        ("4", "caption", 1),
        ("5", "qa", 0),
    ]
    assert samples[0].answers == ("a thing",)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "the line is not JSON"),
        ("[]", "not a JSON object"),
        ('{"id": "\\ud800"}', "not UTF-8"),
        ({"image": "a.png"}, "'answers' is missing"),
        ({"image": "a.png", "answers": []}, "'answers' is missing"),
        ({"image": "a.png", "answers": [" "]}, "an answer is ' '"),
        ({"image": "a.png", "answers": [3]}, "an answer is 3"),
        ({"image": "absent.png", "answers": ["x"]}, "is no file"),
        ({"image": 3, "answers": ["x"]}, "an image is 3"),
        ({"answers": ["x"]}, "a caption needs an image"),
        ({"image": "a.png", "answers": ["x"], "task": "qa"}, "needs a 'question'"),
        ({"image": "a.png", "answers": ["x"], "task": "vqa"}, "'task' is 'vqa'"),
        ({"image": "a.png", "answers": ["x"], "questoin": "?"}, "unknown field 'questoin'"),
        ({"image": "a.png", "answers": ["x"], "caption": "y"}, "say the same thing"),
        ({"image": "a.png", "question": "<image><image>", "answers": ["x"]}, "mark all or none"),
        ({"image": "a.png", "id": 3, "answers": ["x"]}, "'id' is 3"),
    ],
)
def test_a_bad_row_is_named(row: Any, problem: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"image": "a.png", "answers": ["x"]}, row)
    with pytest.raises(ConfigError) as caught:
        read_samples(path)
    (line,) = caught.value.problems
    assert line.startswith(f"{path}:2: ")
    assert problem in line


def test_every_bad_row_is_named_up_to_a_limit(tmp_path: Path) -> None:
    path = written(tmp_path, *["[]"] * (MAX_PROBLEMS + 2))
    with pytest.raises(ConfigError) as caught:
        read_samples(path)
    assert len(caught.value.problems) == MAX_PROBLEMS + 1
    assert "2 more" in caught.value.problems[-1]


def test_ids_are_unique_and_files_hold_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"id '1' is that of line 1"):
        read_samples(
            written(tmp_path, {"image": "a.png", "answers": ["x"]}, {"question": "?", "answers": ["x"], "id": "1"})
        )
    with pytest.raises(UserError, match="holds no sample"):
        read_samples(written(tmp_path, ""))


class Words:
    """A processor that has no turns."""

    def plain(self, text: str) -> str:
        return text


class Turns(Words):
    """A processor that writes turns."""

    chat_template = "some"

    def apply_chat_template(self, turns: Any, **settings: Any) -> str:
        assert settings == {"add_generation_prompt": True, "tokenize": False}
        return json.dumps(turns)


def test_questions_become_turns_where_the_model_knows_them(tmp_path: Path) -> None:
    caption, question, marked = read_samples(
        written(
            tmp_path,
            {"image": "a.png", "caption": "x"},
            {"image": "a.png", "question": "What?", "answers": ["x"]},
            {"image": "a.png", "question": "In <image>, what?", "answers": ["x"]},
        )
    )
    assert prompt_of(caption, Turns(), "auto") == prompt_of(caption, Words(), "plain") == "<image>"
    assert prompt_of(question, Words(), "auto") == "<image>What?"
    assert json.loads(prompt_of(question, Turns(), "auto")) == [{"role": "user", "content": content_of(question)}]
    assert content_of(question) == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert [part["type"] for part in content_of(marked)] == ["text", "image", "text"]
    with pytest.raises(UserError, match="no chat template"):
        prompt_of(question, Words(), "chat")
