"""The quickstart's scenes: one true caption each, held-out pairs never seen, the same files for the same seed."""

import re
from pathlib import Path

import pytest

from examples.quickstart.scenes import EMOJI, SceneSampler, build_scenes, emoji_names
from navil_megatron.config.errors import UserError
from navil_megatron.data.shards.source import Source


def test_names_are_distinct_words() -> None:
    names = emoji_names(len(EMOJI))
    assert len(names) == len(EMOJI) == len(set(EMOJI)) >= 40
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)?", name) for name in names)


@pytest.mark.parametrize("difficulty", [1, 2, 3, 4])
def test_captions_are_true_and_unambiguous(difficulty: int) -> None:
    names = list(emoji_names(20))
    sampler = SceneSampler(names, difficulty, 0.15, seed=5)
    heldout = set(sampler.heldout_pairs)
    scenes = [sampler.draw() for _ in range(2000)]
    assert {len(scene.items) for scene in scenes} == ({2} if difficulty == 1 else {2, 3})
    assert {item.name for scene in scenes for item in scene.items} == set(names)
    for scene in scenes:
        words = " left of " if scene.horizontal else " above "
        parts = scene.caption.split(words)
        assert len(parts) == len(scene.items)
        for part, item in zip(parts, scene.items, strict=True):
            number = {1: "an?", 2: "two", 3: "three"}[item.count]
            stem = item.name if item.count == 1 else item.name.removesuffix("y")
            assert re.match(rf"{number} ({item.size} )?{stem}", part)
        found = [item.name for item in scene.items]
        assert not any({*pair} <= {*found} for pair in heldout)
    spoken = " ".join(scene.caption for scene in scenes)
    assert ("small" in spoken) == (difficulty >= 3)
    assert ("three" in spoken) == (difficulty >= 4)
    orders = set()
    for pair in sampler.heldout_pairs:
        for _ in range(8):
            scene = sampler.draw(pair)
            order = [item.name for item in scene.items if item.name in pair]
            assert frozenset(order) == pair
            orders.add(tuple(order))
    assert len(orders) > 1.8 * len(heldout)  # both orders of nearly every pair


def test_shards_tokenizer_and_summary(tmp_path: Path) -> None:
    arguments = {"num_train": 120, "num_heldout": 30, "num_emoji": 8, "seed": 2}
    summary = build_scenes(tmp_path / "a", **arguments)
    again = build_scenes(tmp_path / "b", **arguments)
    for left, right in zip(summary["train_shards"], again["train_shards"], strict=True):
        assert Path(left).read_bytes() == Path(right).read_bytes()
    assert (tmp_path / "a" / "train.index").read_bytes() == (tmp_path / "b" / "train.index").read_bytes()
    train, heldout = (Source(tmp_path / "a" / f"{split}.index") for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (120, 30)
    sizes = {(int(record["height"]), int(record["width"])) for record in train.index.images}
    assert len(sizes) > 20 and any(height % 32 for height, _ in sizes)
    assert min(height * width for height, width in sizes) >= 44 * 88
    captions = {train.read(index).content for index in range(len(train))}
    assert not captions & {heldout.read(index).content for index in range(len(heldout))}
    assert "CC BY-SA 4.0" in summary["attribution"]
    assert summary["max_caption_tokens"] < 20
    with pytest.raises(UserError, match="already holds scenes"):
        build_scenes(tmp_path / "a", **arguments)
    with pytest.raises(UserError, match="num_emoji is 999"):
        build_scenes(tmp_path / "c", num_emoji=999)
