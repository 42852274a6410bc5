"""``data build`` and ``data index``: from files to shards that train, with a report of everything left out."""

import json
from pathlib import Path

import pytest

from navil_megatron.config.errors import UserError
from navil_megatron.data.build_shards import build_shards, index_shards
from navil_megatron.data.shard_index import NOT_COUNTED, index_path, load_index
from navil_megatron.data.shards import ShardSet
from navil_megatron.data.tokenizer import build_tokenizer
from tests.unit.data_examples import picture
from tools.build_shards import main


def write_manifest(folder: Path) -> Path:
    images = folder / "images"
    images.mkdir(parents=True)
    (images / "a.png").write_bytes(picture(40, 50))
    (images / "wrong.png").write_bytes(picture(40, 50, kind="JPEG"))
    (images / "cut.jpg").write_bytes(picture(90, 90, kind="JPEG")[:-2000])
    lines = [
        json.dumps({"image": "images/a.png", "caption": "one"}),
        json.dumps({"image": "images/wrong.png", "caption": "two é"}),
        json.dumps({"caption": "text alone"}),
        "",
        json.dumps({"image": "images/cut.jpg", "caption": "three"}),
        json.dumps({"image": "images/none.png", "caption": "four"}),
        json.dumps({"image": "images/a.png"}),
        json.dumps({"image": "images/a.png", "caption": " "}),
        json.dumps({"image": ["images/a.png"], "caption": "five"}),
        "{",
    ]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder / "manifest.jsonl"


def test_a_folder_becomes_shards_with_a_report(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    ticks: list[tuple[int, int]] = []
    report = build_shards(manifest, tmp_path / "out", samples_per_shard=2, on_progress=lambda *t: ticks.append(t))
    assert ticks == [(done, 9) for done in range(1, 10)]
    assert report["num_samples"] == 3 and report["num_rejected"] == 6
    assert report["rejected_reasons"] == {
        "image: damaged image data": 1,
        "image file cannot be read": 2,
        "line without a caption": 1,
        "empty caption": 1,
        "line is not JSON": 1,
    }
    assert {"where": f"{manifest}:4", "reason": "image: damaged image data"} in report["rejected"]
    assert report["bytes"] == sum(Path(shard).stat().st_size for shard in report["shards"]) > 0
    shards = ShardSet(report["shards"])
    assert [shards.read(index).caption for index in range(3)] == ["one", "two é", "text alone"]
    assert shards.read(0).images == ((tmp_path / "images" / "a.png").read_bytes(),)
    with pytest.raises(UserError, match=r"already holds shard-\*.tar"):
        build_shards(manifest, tmp_path / "out")


def test_existing_shards_are_indexed_anew_with_token_counts(tmp_path: Path) -> None:
    report = build_shards(write_manifest(tmp_path), tmp_path / "out")
    shard = report["shards"][0]
    assert load_index(shard)[0]["tokenizer"].tobytes() == NOT_COUNTED
    index_path(shard).unlink()
    tokenizer = build_tokenizer(["one two text alone"] * 3, tmp_path / "tokenizer")
    again = index_shards([str(tmp_path / "out" / "*.tar")], tokenizer=tmp_path / "tokenizer")
    assert (again["num_samples"], again["shards"]) == (3, [shard])
    header, records = load_index(shard)
    assert header["tokenizer"].tobytes().hex() == tokenizer.fingerprint
    assert records["caption_tokens"].tolist() == tokenizer.count(["one", "two é", "text alone"]).tolist()


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"image": "x.png", "caption": "x"}\n')
    with pytest.raises(UserError, match=r"no sample is any good \(image file cannot be read: 1\)"):
        build_shards(tmp_path / "m.jsonl", tmp_path / "out")
    with pytest.raises(UserError, match=r"manifest .*none.jsonl cannot be read"):
        build_shards(tmp_path / "none.jsonl", tmp_path / "out")


def test_the_script_of_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["build_shards.py", str(write_manifest(tmp_path)), str(tmp_path / "out")])
    assert main() == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 3
    assert main() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {tmp_path / 'out'} already holds")
