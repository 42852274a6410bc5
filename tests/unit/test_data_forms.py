"""The forms that people have: each becomes what it says, or a line that says why not; nothing is dropped in silence."""

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from navil_megatron.cli import main
from navil_megatron.config.errors import UserError
from navil_megatron.data.content import dump_content, parse_content
from navil_megatron.data.shards import json_array
from navil_megatron.data.shards.build_shards import build_shards
from navil_megatron.data.shards.index_report import describe_index_report
from navil_megatron.data.shards.manifest import Manifest
from navil_megatron.data.shards.manifest_line import Keys
from navil_megatron.data.shards.shard_index import (
    KIND_INTERLEAVED_JSON,
    KIND_INTERLEAVED_TEXT,
    KIND_JSON,
    KIND_TEXT,
    ShardEntries,
    save_index,
)
from navil_megatron.data.shards.source import Source
from navil_megatron.data.tokenizer import SampleTokenizer
from navil_megatron.data.types import Content, Document, Turn
from tests.unit.shard_examples import index_tar, picture, small_tokenizer, write_tar

A, B = picture(40, 50), picture(44, 33, kind="JPEG")
PICTURES = {"a.png": A, "b.jpg": B}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SampleTokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in PICTURES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def write(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "m.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def read_all(index: Path) -> list[tuple[Content, tuple[bytes, ...]]]:
    source = Source(index)
    samples = [source.read(number) for number in range(len(source))]
    return [(sample.content, sample.images) for sample in samples]


def built(folder: Path, manifest: Path, tokenizer: SampleTokenizer, **options: Any) -> list[Any]:
    """The samples of a manifest in which every line is good."""
    out = folder / "out" / str(len([*(folder / "out").glob("*")]))
    report = build_shards(manifest, out, tokenizer, **options)
    assert report["rejected_reasons"] == {}
    return read_all(Path(report["index"]))


MMC4 = [{"image_name": "b.jpg", "matched_text_index": 2}, {"image_name": "a.png", "matched_text_index": 0}]
INTERLEAVED: dict[str, tuple[dict[str, Any], tuple[str | None, ...]]] = {
    "marks": (
        {"images": ["a.png", "b.jpg"], "text": "Intro. <image> A paragraph. <image> The end.\n"},
        ("Intro. ", None, " A paragraph. ", None, " The end."),
    ),
    "marks side by side": (
        {"images": ["a.png", "b.jpg"], "caption": "<image><image>\nboth <3"},
        (None, None, "\nboth <3"),
    ),
    "marks at the end": ({"images": ["a.png", "b.jpg"], "text": "Two:\n<image> <image>"}, ("Two:\n", None, " ", None)),
    "OBELICS": (
        {"images": [None, "a.png", None, None, "b.jpg"], "texts": ["Intro <image>.", None, "One.", "Two.", None]},
        ("Intro <image>.", None, "One.\n\nTwo.", None),
    ),
    "lists with places alone": ({"images": ["a.png", "b.jpg"], "texts": [None, "x", None]}, (None, "x", None)),
    "MMC4": (
        {"text_list": ["One.", "Two.", "Three."], "image_info": MMC4, "url": "https://x", "similarity_matrix": [[1]]},
        (None, "One. Two.", None, "Three."),
    ),
}


@pytest.mark.parametrize("form", INTERLEAVED)
def test_pictures_stand_where_their_marks_are(form: str, folder: Path, tokenizer: SampleTokenizer) -> None:
    line, parts = INTERLEAVED[form]
    assert built(folder, write(folder, line), tokenizer) == [(Document(parts), (A, B))]
    source = Source(folder / "out" / "0" / "shard.index")
    pieces = tokenizer.pieces(Document(parts), 2)
    assert source.index.samples["text_tokens"].tolist() == [sum(len(piece.ids) for piece in pieces)]
    assert [piece.image for piece in pieces] == [part is None for part in parts] + [False]
    source.check_shard(0)


def test_tars_hold_interleaved_documents_too(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    def lists(**fields: Any) -> bytes:
        return json.dumps(fields).encode()

    turned = [*MMC4[::-1]]
    members = [
        ("0.0.png", A), ("0.1.jpg", B), ("0.txt", b"x <image> y <image>"),
        ("1.png", A), ("1.json", lists(images=["https://x/a.png", None], texts=[None, "x"])), ("1.txt", b"not this"),
        ("2.0.png", A), ("2.1.jpg", B), ("2.json", lists(text_list=["One.", "Two.", "Three."], image_info=turned)),
        ("3.png", A), ("3.json", lists(text="<image>\na cat")),
        ("4.png", A), ("4.json", lists(caption=None, text="a cat")),
        ("5.0.png", A), ("5.1.jpg", B), ("5.json", lists(text_list=["One.", "Two.", "Three."], image_info=MMC4)),
        ("6.0.png", A), ("6.1.jpg", B), ("6.txt", b"one <image> alone"),
        ("7.png", A), ("7.json", lists(images=[None], texts=["x"])),
        ("8.txt", b"the <image> tag"),
        ("9.png", A), ("9.json", lists(images=["a.png"], texts=["x"])),
    ]  # fmt: skip
    source, reasons, samples = index_tar(write_tar(tmp_path / "x.tar", members), tokenizer)
    assert [(sample.content, len(sample.images)) for sample in samples] == [
        (Document(("x ", None, " y ", None)), 2),
        (Document((None, "x")), 1),
        (Document((None, "One. Two.", None, "Three.")), 2),
        (Document((None, "\na cat")), 1),
        ("a cat", 1),
    ]
    assert reasons == {
        "image marks and images differ in number": 3,
        "image_info is not in the order of its texts": 1,
        "a text and an image in one place": 1,
    }
    kinds = [KIND_INTERLEAVED_TEXT, *[KIND_INTERLEAVED_JSON] * 3, KIND_JSON]
    assert source.index.samples["kind"].tolist() == kinds


def test_an_index_of_before_has_marks_as_text(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    """A run that reads it goes on with the tokens that it counted."""
    tar = write_tar(tmp_path / "x.tar", [("0.png", A), ("0.txt", b"an <image> of it")])
    index = index_tar(tar, tokenizer)[0].index
    samples = index.samples[:].copy()
    samples["kind"] = KIND_TEXT
    entries = ShardEntries(samples, index.images[:].copy(), index.shards[0], [])
    save_index(index.path, lambda: [entries], index.shards, index.tokenizer)
    assert Source(index.path).read(0).content == "an <image> of it"


@pytest.mark.parametrize("content", ["use <image> here", Document((None, "a <image> b", None)), Document(("x", None))])
def test_what_is_written_parses_to_what_it_was(content: Content) -> None:
    ending, member = dump_content(content)
    num_images = 2 if isinstance(content, str) else content.parts.count(None)
    assert parse_content(member, ending == "json", num_images)[1] == content


def test_bad_lines_are_left_out_with_their_numbers(
    folder: Path, tokenizer: SampleTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[tuple[dict[str, Any], str]] = [
        ({"image": "a.png", "text": "one <image> two <image>"}, "image marks and images differ in number"),
        ({"images": ["a.png", "b.jpg"], "text": "one <image>"}, "image marks and images differ in number"),
        ({"text": "no picture <image>"}, "image marks and images differ in number"),
        ({"images": ["a.png"], "texts": ["x", "y"]}, "texts and images differ in length"),
        ({"images": ["a.png", None], "texts": ["x", "y"]}, "a text and an image in one place"),
        ({"images": ["a.png"], "texts": [None]}, "empty caption"),
        ({"text_list": ["x"], "image_info": [{"matched_text_index": 1}]}, "matched_text_index is of no text"),
        ({"text_list": ["x"], "image_info": [{"matched_text_index": 0}]}, "image file cannot be read"),
        ({"text_list": ["x"], "image_info": ["a.png"]}, "text_list or image_info is not as in MMC4"),
        ({"image": "a.png", "caption": "x", "text": "y"}, "caption and text in one line"),
        ({"image": "a.png", "images": ["b.jpg"], "text": "y"}, "image and images in one line"),
        ({"text": 5}, "text is a number, expected a text"),
        ({"image": "a.png", "caption": ["x", "y"]}, "caption is a list, expected a text"),
        ({"image": "a.png"}, "line without a caption"),
    ]
    manifest = write(folder, *[line for line, _ in lines], {"text": "good"})
    report = build_shards(manifest, folder / "out", tokenizer)
    listed = [json.loads(line) for line in Path(report["rejected"]).read_text().splitlines()]
    expected = [(f"line {number}", reason) for number, (_, reason) in enumerate(lines, 1)]
    assert [(row["key"], row["reason"]) for row in listed] == expected
    assert "left out 1: caption and text in one line (the first: line 10)" in describe_index_report(report)


def test_null_and_nothing_are_no_values(folder: Path, tokenizer: SampleTokenizer) -> None:
    talk = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "five"}]
    lines = [
        {"image": None, "images": ["a.png"], "caption": "one"},
        {"image": "a.png", "caption": None, "text": "four", "img": None},
        {"image": "a.png", "caption": "", "conversations": None, "messages": talk},
        {"image": None, "conversations": None, "messages": None, "text": "seven"},
        {"images": [None, "a.png", ""], "texts": None, "text": "eight"},
    ]
    samples = built(folder, write(folder, *lines), tokenizer)
    assert [len(images) for _, images in samples] == [1, 1, 1, 0, 1]
    assert [content for content, _ in samples if isinstance(content, str)] == ["one", "four", "seven", "eight"]


@pytest.mark.parametrize("key", ["img", "image_path", "captions", "question"])
def test_unknown_keys_end_a_build_before_it_begins(
    key: str, folder: Path, tokenizer: SampleTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write(folder, {"text": "x"}, {key: "a.png", "text": "y"})
    command = ["data", "build", str(manifest), str(folder / "out"), "--tokenizer", tokenizer.hugging_face.name_or_path]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"m.jsonl, line 2: '{key}' is not a key of a sample; " in error
    assert {"captions": "the nearest is 'caption'", "question": "keys are image,"}.get(
        key, "nearest is 'image'"
    ) in error
    assert not list(folder.glob("out/*.index*"))
    assert main([*command, "--ignore", key]) == 0
    assert Source(folder / "out" / "shard.index").read(1).images == ()


def test_keys_have_the_users_names(folder: Path, tokenizer: SampleTokenizer) -> None:
    manifest = write(folder, {"img_path": "a.png", "text": "x", "score": 3, "caption": "not this"})
    keys = Keys.parse(["image=img_path,caption=text"], ["score", "caption"])
    assert built(folder, manifest, tokenizer, keys=keys) == [("x", (A,))]
    with pytest.raises(UserError, match="line 1: 'caption' stands there twice under --map: give --ignore"):
        build_shards(manifest, folder / "other", tokenizer, keys=Keys.parse(["image=img_path,caption=text"], ["score"]))
    for wrong in ("picture=img", "image", "image=", "image=a,image=b", "image=a,images=a"):
        with pytest.raises(UserError, match="--map"):
            Keys.parse([wrong])


def test_a_key_that_comes_late_is_named_too(folder: Path, tokenizer: SampleTokenizer) -> None:
    manifest = write(folder, *[{"text": "x"}] * 200, {"img": "a.png", "text": "y"})
    with pytest.raises(UserError, match=r"line 201: 'img' is not a key of a sample"):
        build_shards(manifest, folder / "out", tokenizer)


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in zip(("human", "gpt"), texts, strict=True)]


LLAVA = [
    {"id": "0", "image": "a.png", "conversations": talk("<image>\nred?", "ü")},
    {"id": "1", "conversations": talk("hi", "ho"), "model": ""},
    {"id": "2", "image": "b.jpg", "caption": 'one, [two], {"three"}'},
]
READ = [
    ((Turn("user", (None, "red?")), Turn("assistant", ("ü",))), (A,)),
    ((Turn("user", ("hi",)), Turn("assistant", ("ho",))), ()),
    ('one, [two], {"three"}', (B,)),
]


@pytest.mark.parametrize("ending", [".json", ".json.gz", ".jsonl.gz"])
@pytest.mark.parametrize("at_once", [7, 2**20])
def test_arrays_and_packed_lines(
    ending: str, at_once: int, folder: Path, tokenizer: SampleTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_array, "_CHARACTERS_AT_ONCE", at_once)
    text = json.dumps(LLAVA, indent=2, ensure_ascii=False)
    if ending == ".jsonl.gz":
        text = "\n".join(map(json.dumps, LLAVA))
    path = folder / f"m{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    assert built(folder, path, tokenizer, samples_per_shard=2) == READ
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 20])
    with pytest.raises(UserError, match=r"manifest .* cannot be read \(.*\): give JSON lines"):
        build_shards(path, folder / "cut", tokenizer)
    assert not list(folder.glob("cut/*.tar"))


@pytest.mark.parametrize("text", ["[{}", '[{"text": "x"}] {}', '[{"text": "x"} {]', '[{"text": "x"}, nothing]', "["])
def test_damaged_arrays_are_one_line(text: str, folder: Path, tokenizer: SampleTokenizer) -> None:
    (folder / "m.json").write_text(text)
    with pytest.raises(UserError, match=r"m.json cannot be read \(.*array.*\)"):
        build_shards(folder / "m.json", folder / "out", tokenizer)


def rows() -> pa.Table:
    """As ``datasets`` has pictures: bytes, or a path where they lie beside."""
    pictures = [{"bytes": A, "path": "x.png"}, {"bytes": None, "path": "b.jpg"}, None]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    texts = ["one", "two", "three"]
    return pa.table({"image": pa.array(pictures, struct), "text": texts, "id": range(3)})


FOUND = [("one", (A,)), ("two", (B,)), ("three", ())]


def test_tables_hold_pictures(folder: Path, tokenizer: SampleTokenizer) -> None:
    pyarrow.parquet.write_table(rows(), folder / "t.parquet", row_group_size=2)
    assert built(folder, folder / "t.parquet", tokenizer, samples_per_shard=2) == FOUND
    saved = folder / "saved"
    saved.mkdir()
    (saved / "b.jpg").write_bytes(B)
    for number, part in enumerate((rows().slice(0, 1), rows().slice(1))):
        with pa.ipc.new_stream(str(saved / f"data-{number:05d}-of-00002.arrow"), part.schema) as stream:
            stream.write_table(part)
    (saved / "dataset_info.json").write_text("{}")
    assert built(folder, saved, tokenizer, samples_per_shard=2) == FOUND
    manifest = pickle.loads(pickle.dumps(Manifest(saved)))  # as it goes to other processes
    assert [number for chunk in manifest.chunks(2) for number, _ in manifest.read(chunk)] == [0, 1, 2]
    named = pa.table({"jpg": pa.array([A, B], pa.binary()), "caption": ["one", "two"], "similarity": [0.1, 0.2]})
    pyarrow.parquet.write_table(named, folder / "named.parquet")
    with pytest.raises(UserError, match=r"named.parquet: column 'jpg' is not a key of a sample"):
        build_shards(folder / "named.parquet", folder / "other", tokenizer)
    keys = Keys.parse(["image=jpg"], ["similarity"])
    assert built(folder, folder / "named.parquet", tokenizer, keys=keys) == [("one", (A,)), ("two", (B,))]
    with pytest.raises(UserError, match="has no column 'none', which --map names"):
        keys = Keys.parse(["image=jpg,images=none"], ["similarity"])
        build_shards(folder / "named.parquet", folder / "other", tokenizer, keys=keys)


def test_what_is_no_table_of_samples_says_what_it_is(folder: Path, tokenizer: SampleTokenizer) -> None:
    table = pa.table({"url": ["u"], "key": ["0"], "status": ["success"], "caption": ["x"]})
    pyarrow.parquet.write_table(table, folder / "00000.parquet")
    write_tar(folder / "00000.tar", [("0.jpg", B), ("0.txt", b"x")])
    with pytest.raises(UserError, match=r"img2dataset's table of .*00000.tar.*: give that one to navil-megatron data"):
        build_shards(folder / "00000.parquet", folder / "out", tokenizer)
    splits = folder / "splits"
    (splits / "train").mkdir(parents=True)
    (splits / "dataset_dict.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds several splits: give one of .*train"):
        build_shards(splits, folder / "out", tokenizer)
    with pytest.raises(UserError, match=r"train is a folder without .arrow or .parquet files"):
        build_shards(splits / "train", folder / "out", tokenizer)
    (splits / "train" / "a.arrow").write_bytes(b"no")
    with pytest.raises(UserError, match=r"a.arrow cannot be read"):
        build_shards(splits / "train", folder / "out", tokenizer)
