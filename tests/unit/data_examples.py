"""Small shards, a tokenizer and a config over them, for the tests of the data path."""

import io
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from navil_megatron.config.data import SourceConfig
from navil_megatron.config.evaluation import EvaluationConfig
from navil_megatron.config.load import load_config
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.shards.shard_index import BLOCK, ShardEntries, save_index
from navil_megatron.data.shards.shard_writer import ShardWriter
from navil_megatron.data.shards.source import Source
from navil_megatron.data.tokenizer import SampleTokenizer, build_tokenizer
from navil_megatron.data.types import Turn
from navil_megatron.files.hashes import short_check
from tests.unit.config_examples import EXAMPLE_TOML

WORDS = ["red", "green", "apple", "key", "fish", "house", "left", "of", "above", "two", "three", "small", "star"]


def picture(height: int, width: int, seed: int = 0, kind: str = "PNG", **options: object) -> bytes:
    """An encoded picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def example_tokenizer(folder: Path) -> SampleTokenizer:
    """The tokenizer of every example, saved into a folder."""
    return build_tokenizer([" ".join(WORDS)] * 4, folder, vocab_size=320)


def write_samples(folder: Path, prefix: str, num_samples: int, *, seed: int = 0, per_shard: int = 25) -> Path:
    """The index over samples of varied sizes and lengths: most with one image, some conversations, some text alone."""
    random = Random(seed)
    tokenizer = example_tokenizer(folder / "tokenizer")
    with ShardWriter(folder, prefix, tokenizer, samples_per_shard=per_shard) as writer:
        for number in range(num_samples):
            words = f"{number} " + " ".join(random.choices(WORDS, k=random.randint(1, 9)))
            pictures = [_any_picture(random, seed=100 * number + which) for which in range(2)]
            key = f"{prefix}{number:05d}"
            if number % 10 == 9:
                writer.write(key, words)
            elif number % 10 == 4:
                first = Turn("user", (None, f"{words}? and ", None, "too?"))
                talk = (first, Turn("assistant", (words,)), Turn("user", ("why?",)), Turn("assistant", ("two star",)))
                writer.write(key, talk, pictures)
            else:
                writer.write(key, words, pictures[:1])
    return writer.index


def _any_picture(random: Random, seed: int) -> bytes:
    size = random.choice([40, 64, 70, 100]), random.choice([33, 64, 96])
    return picture(*size, seed=seed, kind=random.choice(["PNG", "JPEG", "WEBP"]))


def make_config(folder: Path, *indexes: Path, seq_length: int = 128, **training: int) -> NaViLConfig:
    """A run over some indexes, with the example tokenizer."""
    tokenizer = example_tokenizer(folder / "tokenizer")
    path = folder / "run.toml"
    path.write_text(EXAMPLE_TOML)
    config = load_config(path, [])
    model = replace(
        config.model,
        special_token_ids=tokenizer.special_token_ids,
        language=replace(config.model.language, vocab_size=tokenizer.vocab_size),
    )
    data = replace(
        config.data,
        train_sources=tuple(SourceConfig(index=str(index)) for index in indexes),
        tokenizer=str(folder / "tokenizer"),
        seq_length=seq_length,
        min_image_pixels=32 * 32,
        max_image_pixels=64 * 96,
    )
    options = {"global_batch_size": 8, "micro_batch_size": 1, "seed": 7, **training}
    evaluation = EvaluationConfig(sources=tuple(map(str, indexes)))
    training = replace(config.training, **options)
    return replace(config, model=model, data=data, training=training, evaluation=evaluation)


def damage_image(source: Source, index: int, number: int = 0) -> None:
    """Zeros over an image of one sample, as a failing disk leaves it: index and sizes still fit."""
    image = source.index.images_of(index)[number]
    with open(source.shard_of(index), "r+b") as file:
        file.seek(int(image["block"]) * BLOCK)
        file.write(bytes(int(image["bytes"])))


def damage_text(source: Source, index: int) -> None:
    """Another letter in the text of one sample, as one flipped bit leaves it: still a text, of about as many tokens."""
    record = source.index.samples[index]
    with open(source.shard_of(index), "r+b") as file:
        file.seek(int(record["text_block"]) * BLOCK + int(record["text_bytes"]) - 1)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def trust_images(index: Path) -> None:
    """Makes an index whose hashes fit the images as they are now: damaged before they were indexed."""
    source = Source(index)
    samples, images = source.index.samples[:].copy(), source.index.images[:].copy()
    for number, sample in enumerate(samples):
        first = int(sample["first_image"])
        for image in images[first : first + int(sample["num_images"])]:
            with open(source.shard_of(number), "rb") as file:
                file.seek(int(image["block"]) * BLOCK)
                image["check"] = short_check(file.read(int(image["bytes"])))
    shards = source.index.shards
    entries = ShardEntries(samples, images, shards[0], [])
    save_index(index, lambda: [entries], shards, source.index.tokenizer)
