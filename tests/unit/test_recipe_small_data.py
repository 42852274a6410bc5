"""What the small recipe reads: true answers that only the picture tells, unseen pairs, text split by topic."""

import json
import pydoc_data.topics
from pathlib import Path
from random import Random
from typing import Any

from examples.quickstart.scenes import COLOURS, Item, Scene
from examples.recipe_small.build_data import NUM_HELDOUT_TEXTS, QUESTIONS, conversation, questions, texts, write_data
from examples.recipe_small.scores import captions_only, score_by_kind
from navil_megatron.evaluation.samples import read_samples

SCENE = Scene((Item("red apple", 1, None, "blue"), Item("key", 3, None, "red")), horizontal=True)
RIGHT = {
    "How many red apples are there?": "one",
    "How many keys are there?": "three",
    "Which thing is on the left?": "red apple",
    "Which thing is on the right?": "key",
    "Where is the red apple?": "left",
    "Where is the key?": "right",
    "What colour is behind the red apple?": "blue",
    "What colour is behind the key?": "red",
}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_true() -> None:
    assert SCENE.caption == "a red apple on blue left of three keys on red"
    seen = {}
    for seed in range(60):
        asked = questions(SCENE, Random(seed))
        assert tuple(asked) == QUESTIONS
        seen |= dict(asked.values())
    assert seen == RIGHT


def test_no_turn_tells_the_answer_of_another() -> None:
    for seed in range(60):
        turns = [turn["content"] for turn in conversation(SCENE, Random(seed))]
        assert {question: RIGHT[question] for question in turns[::2]} == dict(zip(turns[::2], turns[1::2], strict=True))
        assert sum(question.startswith(("Which", "Where")) for question in turns[::2]) == 1


def test_text_is_split_by_topic() -> None:
    found = texts()
    whole = [" ".join(topic.split()) for topic in pydoc_data.topics.topics.values()]
    assert len(found["heldout"]) == NUM_HELDOUT_TEXTS
    assert len(found["train"]) > 400
    assert all(any(" ".join(piece.split()) in topic for topic in whole) for piece in found["heldout"])
    # Some topics hold others whole: no longer stretch of held-out text may be read in training.
    read = {line.strip() for piece in found["train"] for line in piece.splitlines()}
    told = [line.strip() for piece in found["heldout"] for line in piece.splitlines() if len(line.strip()) > 40]
    assert sum(line in read for line in told) < 0.05 * len(told)


def test_files(tmp_path: Path) -> None:
    data = tmp_path / "data"
    made = write_data(data, 200, 12, 5, seed=1, on_progress=lambda done, total: None)
    again = write_data(tmp_path / "again", 200, 12, 5, seed=1, on_progress=lambda done, total: None)
    assert made == again
    for path in data.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(data)).read_bytes(), path
    train = [row["caption"] for row in rows(data / "train_captions.jsonl")]
    held_out = [row["caption"] for row in rows(data / "heldout_captions.jsonl")]
    for pair in made["heldout_pairs"]:
        assert not any(all(name in caption or f"{name[:-1]}ies" in caption for name in pair) for caption in train)
        assert any(all(name in caption for name in pair) for caption in held_out)
    # Every emoji lies on every colour: the name does not tell it.
    told = " ; ".join(train)
    assert all(f"a {name} on {colour}" in told for name in made["emoji"] for colour in COLOURS)
    for name in ("heldout", "swapped"):
        assert len(read_samples(data / f"{name}.jsonl")) == 12 * (1 + len(QUESTIONS))
    pictures = {row["id"]: row["image"] for row in rows(data / "heldout.jsonl")}
    assert all(pictures[row["id"]] != row["image"] for row in rows(data / "swapped.jsonl"))


def test_scores_by_kind(tmp_path: Path) -> None:
    asked = {"caption-0": "a key", "what colour-0": "red", "what colour-1": "red", "what colour-2": "blue"}
    found = asked | {"what colour-1": "Red"}
    data = tmp_path / "set.jsonl"
    data.write_text("".join(json.dumps({"id": name, "answers": [text]}) + "\n" for name, text in asked.items()))
    (tmp_path / "predictions.jsonl").write_text(
        "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in found.items())
    )
    assert score_by_kind(data, tmp_path) == {
        "caption": {"num": 1, "exact": 1.0, "most_frequent_answer": 1.0},
        "what colour": {"num": 3, "exact": 2 / 3, "most_frequent_answer": 2 / 3},
    }
    captions_only(data, tmp_path / "captions.jsonl")
    assert [row["id"] for row in rows(tmp_path / "captions.jsonl")] == ["caption-0"]
