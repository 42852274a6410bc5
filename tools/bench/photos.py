"""Photo-like JPEGs with captions in shards, for the benchmarks that decode."""

import io
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image

from navil_megatron.data.shards.shard_writer import ShardWriter
from navil_megatron.data.tokenizer import SampleTokenizer, build_tokenizer

WORDS = "a red green apple fish house tree road left of above two star at night"
MEGAPIXELS = (0.3, 0.3, 1, 0.3, 1, 4)


def photo(megapixels: float, random: np.random.Generator) -> bytes:
    """A JPEG of smooth shapes at several sizes with grain: about as many bytes per pixel as a photo."""
    aspect = random.uniform(0.6, 1.7)
    width, height = round((megapixels * 1e6 * aspect) ** 0.5), round((megapixels * 1e6 / aspect) ** 0.5)
    pixels = random.normal(0, 5, (height, width, 3))
    for cells, strength in ((4, 0.6), (24, 0.3), (120, 0.1)):
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += strength * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()


def photo_shards(
    folder: Path, num_samples: int, megapixels: Sequence[float] = MEGAPIXELS
) -> tuple[Path, SampleTokenizer, int]:
    """The index over four shards of captioned photos, the tokenizer, and the bytes of all images."""
    random = np.random.default_rng(0)
    captions = [" ".join(random.choice(WORDS.split(), random.integers(5, 120))) for _ in range(num_samples)]
    tokenizer = build_tokenizer(captions, folder / "tokenizer", vocab_size=1024)
    size = 0
    with ShardWriter(folder / "shards", "photos", tokenizer, samples_per_shard=-(-num_samples // 4)) as writer:
        for number, (caption, size_of) in enumerate(zip(captions, cycle(megapixels))):
            file = photo(size_of, random)
            size += len(file)
            writer.write(f"{number:06d}", caption, [file])
    return writer.index, tokenizer, size
