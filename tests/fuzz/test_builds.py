"""Records of unfinished builds, and manifests, that nobody wrote."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from navil_megatron.config.errors import UserError
from navil_megatron.data.shards.build_shards import build_shards
from navil_megatron.data.shards.pieces import pieces_folder
from navil_megatron.data.shards.shard_index import SourceIndex
from navil_megatron.data.tokenizer import SampleTokenizer
from tests.fuzz.inputs import COUNT, VALUES, damaged_json, fuzz
from tests.unit.shard_examples import picture, small_tokenizer

PATHS = (
    *(
        "0.png",
        "no.png",
        "n" * 256,
        "n" * 5000,
        "a/" * 3000 + "b",
        "../" * 500,
        "/",
        "/proc/self/mem",
        "/dev/zero",
        "~",
    ),
    *("", ".", "..", "0.png\0", "\ud800.png", "\x1b[2J.png", "loop", "0.png/0.png", "file:///etc/passwd", "z" * 2**20),
)
SAMPLE = {"image": ["0.png", "0.png"], "caption": "red"}
CHAT = {"image": "0.png", "conversations": [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}]}


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SampleTokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return pieces_folder(tmp_path / "o" / "shard.index") / "build.json"


@pytest.fixture
def build(tmp_path: Path, tokenizer: SampleTokenizer, record: Path) -> Callable[[bytes], None]:
    """Goes on with an unfinished build of five lines, whose ``build.json`` is replaced."""
    manifest, output = tmp_path / "m.jsonl", tmp_path / "o"
    manifest.write_text("".join(json.dumps({"text": f"red {number}"}) + "\n" for number in range(5)))

    def die(done: int, total: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        build_shards(manifest, output, tokenizer, samples_per_shard=2, on_progress=die)
    whole = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}

    def go_on(content: bytes) -> None:
        shutil.rmtree(output)
        for file, bytes_of_file in whole.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes_of_file)
        record.write_bytes(content)
        build_shards(manifest, output, tokenizer, samples_per_shard=2)
        assert len(SourceIndex(output / "shard.index")) == 5

    return go_on


def test_records_of_unfinished_builds(record: Path, build: Callable[[bytes], None]) -> None:
    """Taken up, or refused; a shard is never made of other lines than the manifest's."""
    known = json.loads(record.read_bytes())
    outcomes = fuzz("build.json", lambda draw: build(damaged_json(known, draw)))
    assert min(outcomes["works"], outcomes["refused"]) > 0


@pytest.mark.parametrize("kind", ["cut", "empty", "no chunks", "half a chunk", "other lines"])
def test_a_damaged_record_of_a_build_is_one_line(record: Path, build: Callable[[bytes], None], kind: str) -> None:
    whole = record.read_bytes()
    known = json.loads(whole)
    content = {
        "cut": whole[: len(whole) // 2],
        "empty": b"{}",
        "no chunks": json.dumps({"made_from": known["made_from"]}).encode(),
        "half a chunk": json.dumps(known | {"chunks": [[0, 0]]}).encode(),
        "other lines": json.dumps(known | {"chunks": known["chunks"][:-1]}).encode(),
    }[kind]
    with pytest.raises(UserError, match=r"build.json (cannot be read|is damaged)|another manifest.*to start anew"):
        build(content)


def test_manifests(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    """Lines of any kind with paths of any length; each is a sample, or counted by its reason."""
    (tmp_path / "0.png").write_bytes(picture(8, 9))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    manifest, output = tmp_path / "m.jsonl", tmp_path / "o"

    def odd_line(draw: random.Random) -> bytes:
        if (kind := draw.randrange(3)) == 0:
            path = draw.choice(PATHS)
            return json.dumps({"image": [path] * draw.choice((1, 2)), "caption": "red"}).encode()
        if kind == 1:
            return json.dumps({"image": draw.choice(VALUES), "caption": "x"}).encode()
        return damaged_json(draw.choice((SAMPLE, CHAT)), draw).replace(b"\n", b" ")

    def read(draw: random.Random) -> None:
        shutil.rmtree(output, ignore_errors=True)
        lines = [*(odd_line(draw) for _ in range(4)), json.dumps(SAMPLE).encode()]
        manifest.write_bytes(b"\n".join(lines) + b"\n")
        report = build_shards(manifest, output, tokenizer, allow_outside=draw.random() < 0.5)
        blank = sum(not line.strip() for line in lines)
        assert report["num_samples"] + report["num_rejected"] == len(lines) - blank

    outcomes = fuzz("manifests", read, COUNT // 4)  # of four lines each
    assert min(outcomes["works"], outcomes["refused"]) > 0
