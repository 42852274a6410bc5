"""Small shards, a tokenizer and a config over them, for the tests of the data path."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from navil_megatron.config.load import load_config
from navil_megatron.config.schema import NaViLConfig
from navil_megatron.data.shards import ShardWriter
from navil_megatron.data.tokenizer import build_tokenizer
from tests.unit.config_examples import EXAMPLE_TOML

WORDS = ["red", "green", "apple", "key", "fish", "house", "left", "of", "above", "two", "three", "small", "star"]


def picture(height: int, width: int, seed: int = 0, kind: str = "PNG", **options: object) -> bytes:
    """An encoded picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def write_samples(folder: Path, prefix: str, num_samples: int, *, seed: int = 0, per_shard: int = 25) -> list[Path]:
    """Samples of varied sizes and caption lengths, every tenth of text alone."""
    random = Random(seed)
    with ShardWriter(folder, prefix, samples_per_shard=per_shard) as writer:
        for number in range(num_samples):
            caption = f"{number} " + " ".join(random.choices(WORDS, k=random.randint(1, 9)))
            size = random.choice([40, 64, 70, 100]), random.choice([33, 64, 96])
            kind, extension = random.choice([("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
            image = None if number % 10 == 9 else picture(*size, seed=number, kind=kind)
            writer.write(f"{prefix}{number:05d}", caption, image, extension)
    return writer.shards


def make_config(folder: Path, shards: Sequence[str], *, seq_length: int = 128, **training: int) -> NaViLConfig:
    """A run over some shards, with a tokenizer that is trained here."""
    tokenizer = build_tokenizer([" ".join(WORDS)] * 4, folder / "tokenizer", vocab_size=320)
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
        train_shards=tuple(shards),
        validation_shards=tuple(shards),
        tokenizer=str(folder / "tokenizer"),
        seq_length=seq_length,
        min_image_pixels=32 * 32,
        max_image_pixels=64 * 96,
    )
    options = {"global_batch_size": 8, "micro_batch_size": 1, "seed": 7, **training}
    return replace(config, model=model, data=data, training=replace(config.training, **options))
