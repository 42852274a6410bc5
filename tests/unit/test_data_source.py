"""Reading samples at random: what went in comes out, from many threads, and what changed is refused."""

import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from navil_megatron.cli import main
from navil_megatron.config.errors import UserError
from navil_megatron.data.content import dump_content
from navil_megatron.data.shards import source as source_module
from navil_megatron.data.shards.shard_index import BLOCK, HEADER, SAMPLE, ShardEntries, SourceIndex, save_index
from navil_megatron.data.shards.shard_writer import ShardWriter
from navil_megatron.data.shards.source import Source
from navil_megatron.data.tokenizer import SampleTokenizer
from navil_megatron.data.types import Turn
from tests.unit.index_examples import random_index
from tests.unit.shard_examples import files_of, index_tar, picture, small_tokenizer, write_tar

PICTURES = [
    picture(32 + size, 40, seed=size, kind=kind) for size, kind in enumerate(["PNG", "JPEG", "WEBP", "GIF", "BMP"])
]
TEXT = st.text(st.characters(codec="utf-8"), max_size=30).filter(lambda text: text.strip())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SampleTokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_samples(folder: Path, tokenizer: SampleTokenizer, num_samples: int = 12) -> ShardWriter:
    with ShardWriter(folder, "s", tokenizer, samples_per_shard=5) as writer:
        for number in range(num_samples):
            writer.write(f"k{number}", f"caption {number} é", PICTURES[: number % 3])
    return writer


def test_samples_come_back_in_any_order_from_many_threads(
    tmp_path: Path, tokenizer: SampleTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "MAX_OPEN_FILES", 1)
    writer = write_samples(tmp_path, tokenizer)
    assert [path.name for path in writer.shards] == ["s-000000.tar", "s-000001.tar", "s-000002.tar"]
    source = Source(writer.index)
    assert len(source) == writer.report["num_samples"] == 12
    numbers = [number * 7 % 12 for number in range(240)]
    with ThreadPoolExecutor(8) as pool:
        samples = list(pool.map(source.read, numbers))
    for number, sample in zip(numbers, samples, strict=True):
        assert (sample.key, sample.content) == (f"k{number}", f"caption {number} é")
        assert sample.images == tuple(PICTURES[: number % 3])
        assert sample.shard == source.shard_of(number) == str(writer.shards[number // 5])
        assert source.key(number) == sample.key
    open_files = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert sum(str(tmp_path) in path and path.endswith(".tar") for path in open_files) == 1


def test_the_same_samples_give_the_same_bytes_wherever_they_lie(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    for name in ("a", "b"):
        write_samples(tmp_path / name, tokenizer)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "c")
    assert Source(tmp_path / "c" / "s.index").read(3).key == "k3"
    other = write_samples(tmp_path / "d", tokenizer, 11)
    assert Source(other.index).index.fingerprint != Source(tmp_path / "b" / "s.index").index.fingerprint


def test_an_unfinished_shard_is_not_left_behind(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "s", tokenizer) as writer:
        writer.write("k", "caption")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@st.composite
def conversations(draw: st.DrawFn, num_images: int) -> tuple[Turn, ...]:
    parts: list[str | None] = [*draw(st.lists(TEXT, max_size=3)), *[None] * num_images]
    parts = draw(st.permutations(parts))
    turns = [Turn("user", tuple(parts)), Turn("assistant", (draw(TEXT),))]
    return tuple([Turn("system", (draw(TEXT),)), *turns] if draw(st.booleans()) else turns)


@st.composite
def samples(draw: st.DrawFn) -> tuple[Any, list[bytes]]:
    images = draw(st.lists(st.sampled_from(PICTURES), max_size=12 if draw(st.booleans()) else 1))
    content = draw(TEXT).strip() if draw(st.booleans()) else draw(conversations(len(images)))
    return content, images


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    written=st.lists(samples(), min_size=1, max_size=6),
    format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    folder=st.sampled_from(["", "a/b/", "ü" * 60 + "/" + "n" * 90 + "/"]),
    upside_down=st.booleans(),
)
def test_what_is_written_is_what_is_read(
    tmp_path: Path, tokenizer: SampleTokenizer, written: list[Any], format: int, folder: str, upside_down: bool
) -> None:
    members = []
    for number, (content, images) in enumerate(written):
        ending, text = dump_content(content)
        if isinstance(content, str) and number % 2:
            ending, text = "json", json.dumps({"caption": content}).encode()
        files = [(f"{folder}{number}.{ending}", text)]
        files += [(f"{folder}{number}.{place}.jpg", image) for place, image in enumerate(images)]
        members += files[::-1] if upside_down else files
    source, reasons, found = index_tar(write_tar(tmp_path / "x.tar", members, format=format), tokenizer)
    assert reasons == {}
    assert [(s.content, list(s.images)) for s in found] == written
    assert [s.key for s in found] == [f"{folder}{number}" for number in range(len(written))]
    tokens = [sum(len(p.ids) for p in tokenizer.pieces(content, len(images))) for content, images in written]
    assert source.index.samples["text_tokens"].tolist() == tokens


def test_a_shard_that_changed_is_one_clear_line(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    writer = write_samples(tmp_path, tokenizer)
    shard = writer.shards[1]
    content = shard.read_bytes()

    def refused(match: str) -> None:
        for call in (Source(writer.index).check_shards, lambda: Source(writer.index).read(7)):
            with pytest.raises(UserError, match=match) as caught:
                call()
            assert "\n" not in str(caught.value) and str(shard) in str(caught.value)
        assert Source(writer.index).read(0).key == "k0"

    Source(writer.index).check_shards()
    shard.write_bytes(content[:5120])
    refused("was replaced or is damaged: it has 5120 bytes, but had .* restore it, or make .*s.index anew with")
    shard.unlink()
    refused("is missing: restore it")
    shard.write_bytes(content)
    source = Source(writer.index)
    assert source.read(7).key == "k7"
    shard.write_bytes(content[:600])  # while it is open
    with pytest.raises(UserError, match="is damaged, it does not fit its index"):
        source.read(8)
    shard.write_bytes(bytes(len(content)))
    with pytest.raises(UserError, match="is damaged, it does not fit its index"):
        Source(writer.index).read(7)


def test_a_damaged_index_is_one_clear_line(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    index = write_samples(tmp_path, tokenizer).index
    content = index.read_bytes()
    for damage, match in [
        (content[:-1], r"is damaged \(\d+ bytes, expected \d+\)"),
        (content[:10], r"is damaged \(10 bytes\)"),
        (b"something else" * 10, "is damaged or of another version"),
        (content[:8] + b"\2" + content[9:], "is damaged or of another version .expected version 3"),
        (content[:-1] + b"}", "is damaged .its header or what follows its records differs from its checksum"),
    ]:
        index.write_bytes(damage)
        with pytest.raises(UserError, match=match) as caught:
            Source(index)
        assert "navil-megatron data index" in str(caught.value) and "\n" not in str(caught.value)
    index.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        Source(index)


def test_no_flipped_bit_of_an_index_is_believed(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    """A bit of any byte: header, records, hashes, list of shards; records are asked for as planning does."""
    index = write_samples(tmp_path, tokenizer).index
    content = index.read_bytes()

    def plan() -> None:
        source = SourceIndex(index)
        records = source.samples[np.arange(len(source))]
        assert len(source.images[np.unique(records["first_image"][records["num_images"] > 0])])

    plan()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        index.write_bytes(damaged)
        with pytest.raises(UserError, match="index .* is damaged") as caught:
            plan()
        assert "\n" not in str(caught.value)


def test_records_of_one_block_do_not_spoil_the_others(tmp_path: Path) -> None:
    """A large index is checked where it is used, and no one has to read all of it."""
    whole = random_index(tmp_path / "a.index", [3000, 100])
    content = bytearray(whole.path.read_bytes())
    content[HEADER.itemsize + 2000 * SAMPLE.itemsize] ^= 4
    whole.path.write_bytes(content)
    index = SourceIndex(whole.path)
    assert (len(index.samples[:1024]), len(index.samples[2048:])) == (1024, 1052)
    assert index.samples[np.array([0, 1023, 2048, 3099])]["kind"].tolist() == [0] * 4
    assert index.samples[-1]["num_images"] >= 0
    for ask in (1500, slice(1000, 1030), np.array([3, 1999]), "kind"):
        with pytest.raises(UserError, match="records from 1024 on differ from their checksum"):
            index.samples[ask]
    with pytest.raises(UserError, match="differ from their checksum"):
        index.check_records()


def test_a_hostile_index_cannot_point_outside(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    """Its hashes fit, its numbers do not: neither a traceback nor gigabytes of memory."""
    writer = write_samples(tmp_path, tokenizer)
    true = Source(writer.index).index
    forged = {
        ("samples", "first_image"): "sample 1 has images that it does not hold",
        ("samples", "text_block"): "refers to bytes that .* does not have",
        ("images", "bytes"): "refers to bytes that .* does not have",
    }
    for (table, field), match in forged.items():
        tables = {"samples": true.samples[:].copy(), "images": true.images[:].copy()}
        tables[table][field] = 2**32 - 1
        entries = ShardEntries(tables["samples"], tables["images"], true.shards[0], [])
        forged_index = tmp_path / "forged.index"
        save_index(forged_index, lambda entries=entries: [entries], true.shards, true.tokenizer)
        with pytest.raises(UserError, match=match):
            Source(forged_index).read(1)


def test_all_bytes_are_compared_with_what_was_indexed(
    tmp_path: Path, tokenizer: SampleTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = write_samples(tmp_path, tokenizer)
    inspect = ["data", "inspect", str(writer.index), "--check", "--deep"]
    assert main(inspect) == main([*inspect, "--jobs", "2"]) == 0
    source = Source(writer.index)
    whole = {shard: shard.read_bytes() for shard in writer.shards}
    image, text = source.index.images_of(7)[0], source.index.samples[11]
    name = (int(source.index.samples[3]["text_block"]) - 1) * BLOCK
    places = [(1, int(image["block"]) * BLOCK + int(image["bytes"]) - 5, "image 0 of sample 7")]
    places += [(2, int(text["text_block"]) * BLOCK, "the text of sample 11"), (0, name, "the header of sample 3")]
    for shard, place, _ in places:
        damaged = bytearray(whole[writer.shards[shard]])
        damaged[place] ^= 1
        writer.shards[shard].write_bytes(damaged)
    capsys.readouterr()
    assert main(inspect[:-1]) == 0  # sizes alone
    assert main(inspect) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: 3 of 3 shards: ")
    for shard, _, what in places:
        assert f"{writer.shards[shard]} is damaged, it does not fit its index" in line and what in line
    assert main(["data", "inspect", str(writer.index), "--deep"]) == 2
