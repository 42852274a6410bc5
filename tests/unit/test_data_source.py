"""Reading samples at random: what went in comes out, from many threads, and what changed is refused."""

import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from navil_megatron.config.errors import UserError
from navil_megatron.data.content import dump_content
from navil_megatron.data.shards import source as source_module
from navil_megatron.data.shards.shard_writer import ShardWriter
from navil_megatron.data.shards.source import Source
from navil_megatron.data.tokenizer import SampleTokenizer
from navil_megatron.data.types import Turn
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
        (content[:-1] + b"}", "is damaged .its list of shards"),
    ]:
        index.write_bytes(damage)
        with pytest.raises(UserError, match=match) as caught:
            Source(index)
        assert "navil-megatron data index" in str(caught.value) and "\n" not in str(caught.value)
    index.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        Source(index)
