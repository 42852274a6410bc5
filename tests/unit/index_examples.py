"""Indexes of random samples, without shards behind them, for the tests of planning."""

from pathlib import Path

import numpy as np

from navil_megatron.data.shards.shard_index import IMAGE, SAMPLE, Shard, ShardEntries, SourceIndex, save_index


def random_index(path: Path, shard_sizes: list[int], seed: int = 0, *, most_images: int = 3) -> SourceIndex:
    """An index of shards of these sizes; samples have up to ``most_images`` images of any shape, and short texts."""
    random = np.random.default_rng(seed)
    entries = []
    for number, size in enumerate(shard_sizes):
        samples = np.zeros(size, dtype=SAMPLE)
        samples["num_images"] = random.integers(0, most_images + 1, size)
        samples["first_image"] = np.cumsum(samples["num_images"]) - samples["num_images"]
        samples["text_tokens"] = random.integers(2, 60, size)
        images = np.zeros(int(samples["num_images"].sum()), dtype=IMAGE)
        images["height"], images["width"] = random.integers(20, 400, (2, len(images)))
        shard = Shard(f"{number:05d}.tar", size, 512, f"{seed:016x}{number:016x}")
        entries.append(ShardEntries(samples, images, shard, []))
    save_index(path, lambda: entries, [of_shard.shard for of_shard in entries], "00" * 16)
    return SourceIndex(path)
