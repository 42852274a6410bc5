"""Indexes, and metadata of checkpoints, that nobody wrote; some with hashes that fit."""

import json
import random
from pathlib import Path

import numpy as np

from navil_megatron.data.shards.shard_index import HEADER, IMAGE, RECORDS_OF_A_CHECK, SAMPLE
from navil_megatron.data.shards.shard_writer import ShardWriter
from navil_megatron.data.shards.source import Source
from navil_megatron.files.checkpoint_metadata import read_metadata
from navil_megatron.files.hashes import check
from tests.fuzz.inputs import change_json, fuzz
from tests.unit.hf_examples import tiny_model, write_checkpoint
from tests.unit.shard_examples import picture, small_tokenizer
from tests.unit.test_hf_fuzz import mutate


def sealed(content: bytes) -> bytes:
    """An index whose hashes and lengths fit what it holds, as far as it can be understood."""
    if len(content) < HEADER.itemsize:
        return content
    header = np.frombuffer(content[: HEADER.itemsize], HEADER)[0].copy()
    start, checks = HEADER.itemsize, []
    for kind, name in ((SAMPLE, "num_samples"), (IMAGE, "num_images")):
        if not 0 < (count := int(header[name])) < RECORDS_OF_A_CHECK:
            return content
        checks.append(check(content[start : start + count * kind.itemsize]))
        start += count * kind.itemsize
    rest = np.array(checks, "<u8").tobytes() + content[start + 16 :]
    header["shard_list_bytes"], header["check"] = len(rest) - 16, 0
    header["check"] = check(header.tobytes() + rest)
    return header.tobytes() + content[HEADER.itemsize : start] + rest


def test_indexes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "whole", small_tokenizer(tmp_path / "tokenizer"), samples_per_shard=3) as writer:
        for number in range(6):
            writer.write(str(number), f"red {number}", [picture(8, 9, number)] * (number % 3))
    original, path = writer.index.read_bytes(), tmp_path / "changed.index"
    list_at = len(original) - int(np.frombuffer(original[: HEADER.itemsize], HEADER)[0]["shard_list_bytes"])
    shards = json.loads(original[list_at:])

    def read(draw: random.Random) -> None:
        if (kind := draw.randrange(4)) == 3:
            content = original[:list_at] + json.dumps(change_json(shards, draw)).encode()
        else:
            content = mutate(original, [(0, len(original)), (0, HEADER.itemsize), (list_at, len(original))], draw)
        path.write_bytes(content if kind == 0 else sealed(content))
        source = Source(path)
        source.index.check_records()
        source.check_shards()
        for number in range(len(source)):
            source.read(number)
        for number in range(len(source.index.shards)):
            source.check_shard(number)

    assert sealed(original) == original
    outcomes = fuzz("indexes", read)
    assert outcomes["refused"] > outcomes.total() // 2


def test_metadata_of_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, tiny_model())
    path = folder / ".metadata"
    original = path.read_bytes()

    def read(draw: random.Random) -> None:
        path.write_bytes(mutate(original, [(0, len(original))], draw))
        read_metadata(folder)

    assert fuzz("metadata", read)["refused"] > 0
