"""``data build``: from manifests to shards that train, however often it is killed and however many work on it."""

import json
import os
import resource
import runpy
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from navil_megatron.cli import main
from navil_megatron.config.errors import UserError
from navil_megatron.data.shards.build_shards import build_shards
from navil_megatron.data.shards.index_shards import index_shards
from navil_megatron.data.shards.manifest import MAX_LINE_BYTES, Manifest
from navil_megatron.data.shards.manifest_line import Line
from navil_megatron.data.shards.source import Source
from navil_megatron.data.tokenizer import SampleTokenizer
from navil_megatron.data.types import Turn
from tests.unit.shard_examples import DeadlyCounter, DieAt, exit_code, files_of, picture, small_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SampleTokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_manifest(folder: Path) -> Path:
    images = folder / "images"
    images.mkdir(parents=True)
    (images / "a.png").write_bytes(picture(40, 50))
    (images / "wrong.png").write_bytes(picture(40, 50, kind="JPEG"))
    (images / "cut.jpg").write_bytes(picture(90, 90, kind="JPEG")[:-2000])
    os.mkfifo(images / "fifo.png")
    turns = [{"from": "human", "value": "<image>\n and <image>?"}, {"from": "gpt", "value": "ü"}]
    lines: list[object] = [
        {"image": "images/a.png", "caption": "one"},
        {"image": "images/wrong.png", "caption": "two é"},
        {"caption": "text alone"},
        "",
        {"image": "images/cut.jpg", "caption": "three"},
        {"image": "images/none.png", "caption": "four"},
        {"image": "images/a.png"},
        {"image": "images/a.png", "caption": " "},
        {"image": ["images/a.png", "images/wrong.png"], "caption": "five"},
        "{",
        {"image": ["images/a.png", "images/wrong.png"], "conversations": turns},
        {"images": ["images/a.png"], "conversations": turns},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"text": "pure text"},
        {"image": "images/fifo.png", "caption": "six"},
        {"image": 7, "caption": "seven"},
        "[1]",
        '{"text": "\\ud800"}',
    ]
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "manifest.jsonl").write_bytes(text.encode() + b'\n{"text": "\xff"}')
    return folder / "manifest.jsonl"


def test_every_kind_of_line_becomes_a_sample_or_a_reason(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    manifest = write_manifest(tmp_path)
    ticks: list[tuple[int, int]] = []
    report = build_shards(
        manifest, tmp_path / "out", tokenizer, samples_per_shard=4, on_progress=lambda *t: ticks.append(t)
    )
    assert ticks == [(done, 5) for done in range(6)]
    assert report["rejected_reasons"] == {
        "image file cannot be read": 3,
        "line without a caption": 1,
        "image: damaged image data": 1,
        "empty caption": 1,
        "line is not JSON": 1,
        "image marks and images differ in number": 1,
        "line is not a JSON object": 1,
        "text is not Unicode": 1,
        "line is not UTF-8": 1,
    }
    listed = [json.loads(line) for line in (tmp_path / "out" / "shard.index.rejected.jsonl").read_text().splitlines()]
    assert len(listed) == report["num_rejected"] == 11
    assert listed[0] == {"shard": str(manifest), "key": "line 5", "reason": "image: damaged image data"}
    a, wrong = (tmp_path / "images" / "a.png").read_bytes(), (tmp_path / "images" / "wrong.png").read_bytes()
    source = Source(tmp_path / "out" / "shard.index")
    source.check_shards()
    samples = [source.read(number) for number in range(len(source))]
    assert [(sample.content, sample.images) for sample in samples] == [
        ("one", (a,)),
        ("two é", (wrong,)),
        ("text alone", ()),
        ("five", (a, wrong)),
        ((Turn("user", (None, " and ", None, "?")), Turn("assistant", ("ü",))), (a, wrong)),
        ((Turn("user", ("hi",)), Turn("assistant", ("ho",))), ()),
        ("pure text", ()),
    ]
    assert [sample.key for sample in samples] == [f"{line:09d}" for line in (0, 1, 2, 8, 10, 12, 13)]
    assert source.index.samples["text_tokens"].tolist() == [
        tokenizer.count([sample.content], [len(sample.images)])[0] for sample in samples
    ]
    before = files_of(tmp_path / "out")
    with pytest.raises(UserError, match=r"out/shard.index is finished: give --overwrite to make it anew"):
        build_shards(manifest, tmp_path / "out", tokenizer)
    (tmp_path / "out" / "shard-other.tar").touch()
    build_shards(manifest, tmp_path / "out", tokenizer, samples_per_shard=4, overwrite=True)
    assert files_of(tmp_path / "out") == before | {"shard-other.tar": b""}
    (tmp_path / "out" / "shard.index").unlink()
    with pytest.raises(UserError, match=r"out already holds shard shards: give --overwrite to make it anew"):
        build_shards(manifest, tmp_path / "out", tokenizer)


def test_jobs_do_not_change_a_byte(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    manifest = write_manifest(tmp_path)
    for jobs in (1, 2):
        build_shards(manifest, tmp_path / str(jobs), tokenizer, samples_per_shard=3, jobs=jobs)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def with_small_files(build: Callable[..., object], tokenizer: SampleTokenizer) -> None:
    """The machine kills the process as it writes byte 6001 of a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    build(tokenizer)


def test_a_killed_build_is_finished_to_the_same_bytes(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    manifest, whole, cut = write_manifest(tmp_path), tmp_path / "whole", tmp_path / "cut"
    build_shards(manifest, whole, tokenizer, samples_per_shard=4)
    build = partial(build_shards, manifest, cut, samples_per_shard=4)
    for where, (work, expected) in {
        "in the middle of a tar": (partial(with_small_files, build, tokenizer), signal.SIGXFSZ),
        "with a tar but not its part": (partial(build, DeadlyCounter(tokenizer.fingerprint)), signal.SIGKILL),
        "between two shards": (partial(build, tokenizer, on_progress=DieAt(2)), signal.SIGKILL),
        "with all parts but no index": (partial(build, tokenizer, on_progress=DieAt(5)), signal.SIGKILL),
    }.items():
        assert exit_code(work) == -expected, where
        finals = [path for path in cut.glob("*") if path.suffix in (".tar", ".index")]
        assert all(path.read_bytes() == (whole / path.name).read_bytes() for path in finals)
        assert not (cut / "shard.index").exists()
    finished = [path.stat().st_mtime_ns for path in sorted(cut.glob("*.tar"))]
    build(tokenizer)
    assert files_of(cut) == files_of(whole)
    assert [path.stat().st_mtime_ns for path in sorted(cut.glob("*.tar"))] == finished


def hold(build: Callable[[], object], started: Path) -> None:
    """A build that stands still after its first shard."""

    def stop(done: int, total: int) -> None:
        if done == 1:
            started.touch()
            signal.pause()

    build(on_progress=stop)  # type: ignore[call-arg]


def test_two_builds_of_one_index_do_not_meet(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    manifest, out, started = write_manifest(tmp_path), tmp_path / "out", tmp_path / "started"
    build = partial(build_shards, manifest, out, tokenizer, samples_per_shard=4)
    process = get_context("forkserver").Process(target=hold, args=(build, started), daemon=True)
    process.start()
    while not started.exists():
        assert process.is_alive()
    before = files_of(out)
    for make in (build, partial(index_shards, [f"{out}/*.tar"], out / "shard.index", tokenizer)):
        with pytest.raises(UserError, match=rf"shard.index is being written by another process; .* {process.pid} on"):
            make()
    assert files_of(out) == before
    build_shards(manifest, out, tokenizer, prefix="other")  # beside it
    process.kill()
    process.join()
    assert build()["num_samples"] == 7
    assert not [path for path in out.iterdir() if path.suffix not in (".tar", ".index", ".jsonl")]


def test_another_manifest_does_not_go_on_with_an_old_build(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    manifest = write_manifest(tmp_path)

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards(manifest, tmp_path / "out", tokenizer, samples_per_shard=4, on_progress=stop)
    with pytest.raises(UserError, match="unfinished build of another manifest, tokenizer or shard size"):
        build_shards(manifest, tmp_path / "out", tokenizer, samples_per_shard=5)
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"unfinished build .*: give the same to go on, or --overwrite to start anew"):
        build_shards(manifest, tmp_path / "out", tokenizer, samples_per_shard=4)


def test_parquet_is_read_across_row_groups(
    tmp_path: Path, tokenizer: SampleTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"red {number}" if number % 5 else None for number in range(23)]
    pyarrow.parquet.write_table(pa.table({"body": texts, "id": range(23)}), tmp_path / "t.parquet", row_group_size=4)
    with pytest.raises(UserError, match=r"column 'body' is not a key .*, or --text-column NAME if all is pure text"):
        build_shards(tmp_path / "t.parquet", tmp_path / "out", tokenizer)
    with pytest.raises(UserError, match=r"has no text column 'text' \(found body, id\): choose one with --text-column"):
        build_shards(tmp_path / "t.parquet", tmp_path / "out", tokenizer, text_column="text")
    report = build_shards(tmp_path / "t.parquet", tmp_path / "out", tokenizer, samples_per_shard=7, text_column="body")
    assert report["rejected_reasons"] == {"line without a caption": 5} and report["num_shards"] == 4
    source = Source(tmp_path / "out" / "shard.index")
    assert [source.read(number).content for number in range(18)] == [text for text in texts if text]
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"pip install 'navil_megatron\[parquet\]'"):
        patch.setitem(sys.modules, "pyarrow", None)  # as on a machine without it
        build_shards(tmp_path / "t.parquet", tmp_path / "other", tokenizer)
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="cannot be read"):
        build_shards(tmp_path / "t.parquet", tmp_path / "other", tokenizer)


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 3, 7, 100])
def test_chunks_hold_every_line_once(tmp_path: Path, rows_per_chunk: int) -> None:
    lines = [b'{"text": "%d"}' % number for number in range(20)]
    lines[4], lines[9] = b"", b"x" * (MAX_LINE_BYTES + 5)
    path = tmp_path / "m.jsonl"
    for ending in (b"", b"\n", b"\r\n"):
        path.write_bytes(b"\n".join(lines) + ending)
        manifest = Manifest(path)
        rows = [row for chunk in manifest.chunks(rows_per_chunk) for row in manifest.read(chunk)]
        assert [number for number, _ in rows] == [number for number in range(20) if number != 4]
        assert str(rows[8][1]) == f"line of more than {MAX_LINE_BYTES} bytes"
        assert all(row == Line([], "txt", str(number).encode()) for number, row in rows if number != 9)


def test_nothing_to_train_on_is_an_error_that_can_be_mended(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"image": "x.png", "caption": "x"}\n')
    with pytest.raises(UserError, match=r"no sample is any good \(image file cannot be read: 1\)"):
        build_shards(path, tmp_path / "out", tokenizer)
    path.write_text('{"text": "x"}\n')
    assert build_shards(path, tmp_path / "out", tokenizer)["num_samples"] == 1
    with pytest.raises(UserError, match=r"manifest .*none.jsonl cannot be read"):
        build_shards(tmp_path / "none.jsonl", tmp_path / "out", tokenizer)


def test_the_verbs(tmp_path: Path, tokenizer: SampleTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, out = write_manifest(tmp_path), tmp_path / "out"
    common = ["--tokenizer", tokenizer.hugging_face.name_or_path]
    assert main(["data", "build", str(manifest), str(out), "--json", *common]) == 0
    built = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert built["num_samples"] == 7
    assert main(["data", "index", f"{out}/*.tar", "--output", str(out / "again.index"), "--headers-only", *common]) == 0
    assert f"{out}/again.index: 7 samples in 1 shards" in capsys.readouterr().out
    assert main(["data", "inspect", str(out / "again.index"), "--check", "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)
    assert inspected["fingerprint"] == built["fingerprint"] and inspected["tokenizer"] == tokenizer.fingerprint
    next(out.glob("*.tar")).write_bytes(b"short")
    assert main(["data", "inspect", str(out / "again.index"), "--check"]) == 2
    assert capsys.readouterr().err.startswith(f"error: shard {out}/shard-000000.tar was replaced")


def test_the_script_of_a_checkout(
    tmp_path: Path, tokenizer: SampleTokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[2] / "tools" / "build_shards.py"
    (tmp_path / "m.jsonl").write_text('{"text": "x"}\n')
    arguments = [tmp_path / "m.jsonl", tmp_path / "out", "--tokenizer", tokenizer.hugging_face.name_or_path, "--json"]
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 1


@pytest.mark.parametrize("kind", ["absolute", "climbs", "link", "linked folder"])
def test_a_manifest_takes_no_picture_from_outside_its_folder(
    kind: str, tmp_path: Path, tokenizer: SampleTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    (theirs / "in").mkdir(parents=True)
    mine.mkdir()
    (mine / "private.png").write_bytes(picture(40, 50))
    (theirs / "in" / "a.png").write_bytes(picture(40, 50, seed=1))
    name = {"absolute": str(mine / "private.png"), "climbs": "in/../../mine/private.png"}.get(kind, "out/private.png")
    if kind == "link":
        (theirs / "out").mkdir()
        (theirs / "out" / "private.png").symlink_to(mine / "private.png")
    elif kind == "linked folder":
        (theirs / "out").symlink_to(mine)
    (theirs / "in" / "b.png").symlink_to(theirs / "in" / "a.png")
    lines = [{"image": "in/../in/b.png", "caption": "one"}, {"image": name, "caption": "two"}]
    (theirs / "m.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "theirs too").symlink_to(theirs)
    build = ["data", "build", str(tmp_path / "theirs too" / "m.jsonl"), str(tmp_path / "out"), "--tokenizer"]
    build.append(tokenizer.hugging_face.name_or_path)
    assert main(build) == main([*build, "--jobs", "2", "--samples-per-shard", "10000"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    for line in lines:
        assert "m.jsonl, line 2, names " in line and "give --allow-outside" in line
    assert not list((tmp_path / "out").glob("*.tar"))
    assert main([*build, "--allow-outside"]) == 0
    assert Source(tmp_path / "out" / "shard.index").read(1).images == ((mine / "private.png").read_bytes(),)
