"""Hostile tars and texts: each is left out and counted by its reason, none crashes, leaks or spoils its neighbours."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from navil_megatron.cli import main
from navil_megatron.config.errors import UserError
from navil_megatron.data.content import RejectedSample, parse_content
from navil_megatron.data.shards.index_build import index_shard
from navil_megatron.data.shards.source import Source
from navil_megatron.data.tokenizer import SampleTokenizer
from tests.unit.shard_examples import files_of, index_tar, picture, small_tokenizer, write_tar

GOOD = picture(40, 50)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SampleTokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def forged_png(width: int, height: int) -> bytes:
    """A small picture whose header claims another size."""
    header = b"IHDR" + struct.pack(">II", width, height) + GOOD[24:29]
    return GOOD[:12] + header + struct.pack(">I", zlib.crc32(header)) + GOOD[33:]


def chat(*turns: tuple[str, object]) -> bytes:
    return json.dumps({"conversations": [{"from": role, "value": text} for role, text in turns]}).encode()


def pair(key: str, image: bytes, text: bytes = b"one", ending: str = "png") -> list[tuple[str, bytes]]:
    return [(f"{key}.{ending}", image), (f"{key}.txt", text)]


BAD: dict[str, tuple[str, list[tuple[str, bytes]]]] = {
    "cut": ("image: damaged image data", pair("cut", GOOD[: len(GOOD) // 2])),
    "noise": ("image: not a readable image file", pair("noise", bytes(range(256)) * 4)),
    "html": ("image: not a readable image file", pair("html", b"<html>404</html>", ending="jpg")),
    "svg": (
        "image: not a readable image file",
        pair("svg", b"<svg xmlns='http://w3.org/2000/svg'/>", ending="svg"),
    ),
    "eps": ("image: not a readable image file", pair("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
    "empty_image": ("image: empty file", pair("empty_image", b"")),
    "bomb": ("image: more than 67108864 pixels", pair("bomb", encoded(Image.new("1", (9000, 9000)), "PNG"))),
    "forged": ("image: more than 67108864 pixels", pair("forged", forged_png(60_000, 60_000))),
    "grown": ("image: damaged image data", pair("grown", forged_png(500, 400))),
    "strip": ("image: aspect ratio beyond 200", pair("strip", picture(2, 500))),
    "wide": ("image: a side of more than 65535 pixels", pair("wide", encoded(Image.new("1", (65_536, 400)), "PNG"))),
    "latin": ("text is not UTF-8", pair("latin", GOOD, b"\xff\xfe")),
    "blank": ("empty caption", pair("blank", GOOD, b" \n")),
    "empty_text": ("empty caption", pair("empty_text", GOOD, b"")),
    "long": ("text of more than 1048576 bytes", pair("long", GOOD, b"a" * (2**20 + 1))),
    "no_text": ("no text file", [("no_text.png", GOOD)]),
    "twice": ("two files of one kind", [*pair("twice", GOOD), ("twice.png", GOOD)]),
    "two_kinds": ("two files of one kind", [*pair("two_kinds", GOOD), ("two_kinds.jpg", GOOD)]),
    "../up": ("path climbs out", pair("../up", GOOD)),
    "a/../../up": ("path climbs out", pair("a/../../up", GOOD)),
    "/etc/root": ("path climbs out", pair("/etc/root", GOOD)),
    "n" * 140_000: ("name too long", pair("n" * 140_000, GOOD)),
    "json": ("text is not JSON", [("json.json", b"{")]),
    "huge_json": ("text of more than 1048576 bytes", [("huge_json.json", b'{"caption": "' + b"a" * 2**20 + b'"}')]),
    "nested": ("text is not JSON", [("nested.json", b"[" * 500_000)]),
    "digits": ("text is not JSON", [("digits.json", b'{"caption": ' + b"9" * 9000 + b"}")]),
    "utf16": ("text is not UTF-8", [("utf16.json", '{"caption": "x"}'.encode("utf-16"))]),
    "surrogate": ("text is not Unicode", [("surrogate.json", b'{"caption": "\\ud800"}')]),
    "list": ("JSON without a caption", [("list.json", b"[]")]),
    "number": ("caption is a number, expected a text", [("number.json", b'{"caption": 3}')]),
    "no_list": ("conversation is not a list of turns", [("no_list.json", b'{"messages": {"role": "user"}}')]),
    "no_turns": ("no assistant turn", [("no_turns.json", b'{"messages": []}')]),
    "asks": ("no assistant turn", [("asks.json", chat(("human", "hi")))]),
    "mute": ("empty assistant turn", [("mute.json", chat(("human", "hi"), ("gpt", " ")))]),
    "role": ("unknown role", [("role.json", chat(("tool", "hi"), ("gpt", "ho")))]),
    "role_list": ("unknown role", [("role_list.json", b'{"messages": [{"role": ["user"], "content": "x"}]}')]),
    "null": ("turn without text", [("null.json", chat(("human", None), ("gpt", "ho")))]),
    "part": ("unknown part of a turn", [("part.json", chat(("human", [{"type": "audio"}]), ("gpt", "ho")))]),
    "drawn": ("image in a turn of the assistant", [("drawn.json", chat(("human", "a"), ("gpt", [{"type": "image"}])))]),
    "marks": (
        "image marks and images differ in number",
        [("marks.png", GOOD), ("marks.json", chat(("human", "<image><image>"), ("gpt", "ho")))],
    ),
    "no_image": (
        "image marks and images differ in number",
        [("no_image.json", chat(("human", "<image>"), ("gpt", "ho")))],
    ),
    "no_user": ("no user turn for the images", [("no_user.png", GOOD), ("no_user.json", chat(("gpt", "ho")))]),
}


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_every_bad_sample_is_counted_and_its_neighbours_stay(
    tmp_path: Path, tokenizer: SampleTokenizer, format: int
) -> None:
    members = []
    for number, (_, files) in enumerate(BAD.values()):
        members += [*files, *pair(f"good{number}", GOOD, f"red {number}".encode())]
    tar = write_tar(tmp_path / "x.tar", [*members, *pair("good0", GOOD)], format=format)
    source, reasons, samples = index_tar(tar, tokenizer)
    expected = Counter(reason for reason, _ in BAD.values()) + Counter({"key occurs again": 1})
    assert reasons == expected
    assert [(s.key, s.content, s.images) for s in samples] == [
        (f"good{number}", f"red {number}", (GOOD,)) for number in range(len(BAD))
    ]
    listed = [json.loads(line) for line in (tmp_path / "x.index.rejected.jsonl").read_text().splitlines()]
    assert {row["key"]: row["reason"] for row in listed} == {key: reason for key, (reason, _) in BAD.items()} | {
        "good0": "key occurs again"
    }
    alone = write_tar(
        tmp_path / "alone.tar", [file for n in range(len(BAD)) for file in pair(f"good{n}", GOOD, f"red {n}".encode())]
    )
    assert index_tar(alone, tokenizer)[0].index.shards[0].content == source.index.shards[0].content


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_take_their_sample_with_them(tmp_path: Path, tokenizer: SampleTokenizer, kind: bytes) -> None:
    tar = write_tar(tmp_path / "x.tar", [("0.txt", b"one"), ("1.txt", b"its image is a link")])
    with tarfile.open(tar, "a") as file:
        info = tarfile.TarInfo("1.png")
        info.type, info.linkname = kind, "/etc/passwd"
        file.addfile(info)
    _, reasons, samples = index_tar(tar, tokenizer)
    assert reasons == {"not a regular file": 1}
    assert [sample.content for sample in samples] == ["one"]


def test_content_decides_and_not_the_extension(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    tar = write_tar(
        tmp_path / "x.tar",
        [
            *pair("0", picture(40, 50, kind="JPEG")),
            *pair("1", picture(30, 50, kind="WEBP"), ending="JPEG"),
            ("._1.png", b"mac"),
            ("2.cls", b"7"),
            ("2.txt", b"text"),
        ],
    )
    source, reasons, _ = index_tar(tar, tokenizer)
    assert reasons == {}
    assert source.index.images[["height", "width"]].tolist() == [(40, 50), (30, 50)]


def test_control_tokens_in_a_caption_are_text(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    words = "<IMG_CONTEXT> <img> </img> <|im_end|> <|im_start|> <pad>"
    tar = write_tar(
        tmp_path / "x.tar", [*pair("0", GOOD, words.encode()), ("1.json", chat(("human", words), ("gpt", words)))]
    )
    source, _, samples = index_tar(tar, tokenizer)
    control = {*tokenizer.special_token_ids, tokenizer.pad_id, tokenizer.end_id}
    for sample, record in zip(samples, source.index.samples, strict=True):
        pieces = tokenizer.pieces(sample.content, len(sample.images))
        assert record["text_tokens"] == sum(len(piece.ids) for piece in pieces) > 50
        found = [token for piece in pieces for token in piece.ids if token in control]
        assert not {*found} & {*tokenizer.special_token_ids, tokenizer.pad_id}
    assert tokenizer.encode(words) and not control & {*tokenizer.encode(words)}


def test_odd_numbers_of_images_are_sorted(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    names = ["01", "2", "²", "10", "9" * 5000, "8" * 5001]
    files = [picture(40, 41 + number) for number in range(len(names))]
    members = [(f"0.{name}.png", file) for name, file in zip(names, files, strict=True)]
    _, reasons, samples = index_tar(write_tar(tmp_path / "x.tar", [*members[::-1], ("0.txt", b"one")]), tokenizer)
    assert reasons == {}
    expected = ["01", "2", "10", "9" * 5000, "8" * 5001, "²"]
    assert list(samples[0].images) == [files[names.index(name)] for name in expected]


def damaged_from(tar: bytes, at: int, what: bytes) -> bytes:
    return tar[:at] + what + tar[at + len(what) :]


@pytest.mark.parametrize("damage", ["cut member", "cut header", "no end", "checksum", "size", "huge header", "loop"])
def test_a_damaged_tar_counts_up_to_the_damage(tmp_path: Path, tokenizer: SampleTokenizer, damage: str) -> None:
    tar = write_tar(tmp_path / "x.tar", [file for number in range(6) for file in pair(str(number), GOOD)])
    whole = tar.read_bytes()
    with tarfile.open(tar) as file:
        at = file.getmember("3.txt").offset
    header = tarfile.TarInfo("3.txt")
    header.size = 2**40
    forged = header.tobuf(tarfile.GNU_FORMAT)
    header.type, header.size = tarfile.XHDTYPE, 2**62
    long = header.tobuf(tarfile.GNU_FORMAT)
    header.size = -(2**40)
    negative = header.tobuf(tarfile.GNU_FORMAT)
    damaged = {
        "cut member": whole[: at + 512 + 2],
        "cut header": whole[: at + 100],
        "no end": whole[:at],
        "checksum": damaged_from(whole, at, b"\0\0\1\2"),
        "size": damaged_from(whole, at, forged),
        "huge header": damaged_from(whole, at, long),
        "loop": damaged_from(whole, at, negative),
    }
    tar.write_bytes(damaged[damage])
    _, reasons, samples = index_tar(tar, tokenizer)
    assert reasons == {"shard is damaged or no uncompressed tar from here on": 1}
    assert [sample.key for sample in samples] == ["0", "1", "2"]


APART = "its files lie apart: make the tar anew with tar --sort=name"
BESIDE = "a file beside the pictures, which KEY.0.png, KEY.1.png are"
DOTTED = "two files of one kind: names are cut at their first dot"


def test_no_caption_loses_a_picture_that_lies_elsewhere(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    """As ``tar cf x.tar .`` leaves them; whole samples and those that come twice stay what they were."""
    texts = [(f"{key}.txt", b"one") for key in "abc"]
    pictures = [(f"{key}.png", GOOD) for key in "abc"]
    talk = ("d.json", chat(("human", "hi"), ("gpt", "ho")))
    members = [*texts, *pair("w", GOOD), talk, *pictures, ("d.png", GOOD), *pair("w", GOOD), ("t.txt", b"two")]
    _, reasons, samples = index_tar(write_tar(tmp_path / "x.tar", members), tokenizer)
    assert reasons == {APART: 4, "key occurs again": 1}
    assert [(sample.key, sample.content, sample.images) for sample in samples] == [
        ("w", "one", (GOOD,)),
        ("t", "two", ()),
    ]
    alone = index_tar(write_tar(tmp_path / "y.tar", [*pair("w", GOOD), ("t.txt", b"two")]), tokenizer)[0]
    assert alone.index.shards[0].content == index_shard(str(tmp_path / "x.tar"), tokenizer).shard.content
    alone.check_shard(0)
    Source(tmp_path / "x.index").check_shard(0)


def test_joined_tars_are_read_to_their_end(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    one, two, three = (
        write_tar(tmp_path / f"{name}.tar", [*pair(name, GOOD), *pair(f"{name}2", GOOD)]).read_bytes() for name in "abc"
    )
    (tmp_path / "x.tar").write_bytes(one + two + bytes(3 * 2**20) + three)
    source, reasons, samples = index_tar(tmp_path / "x.tar", tokenizer)
    assert reasons == {}
    assert [sample.key for sample in samples] == ["a", "a2", "b", "b2", "c", "c2"]
    assert {sample.images for sample in samples} == {(GOOD,)}
    source.check_shard(0)
    (tmp_path / "y.tar").write_bytes(one + two[:700])
    assert index_tar(tmp_path / "y.tar", tokenizer)[1] == {"shard is damaged or no uncompressed tar from here on": 1}
    for number, rest in enumerate((b"more bytes" * 100, b"x", bytes(3000) + b"x")):
        (tmp_path / f"{number}.tar").write_bytes(one + rest)
        _, reasons, samples = index_tar(tmp_path / f"{number}.tar", tokenizer)
        assert reasons == {"what lies behind the end of the tar is no tar": 1} and len(samples) == 2


@pytest.mark.parametrize(
    ("names", "pictures", "beside"),
    [
        (("k.png", "k.seg.png"), 1, ("k.seg.png",)),
        (("k.png", "k.mask2.png", "k.depth.tiff"), 1, ("k.mask2.png", "k.depth.tiff")),
        (("k.0.png", "k.1.png", "k.0.seg.png", "k.seg0.png"), 2, ("k.0.seg.png", "k.seg0.png")),
        (("k.png", "k.1.png"), 2, ()),
        (("k.img0.png", "k.img1.png"), 2, ()),
        (("k.input.png",), 1, ()),
    ],
)
def test_no_mask_is_taken_for_a_picture(
    names: tuple[str, ...], pictures: int, beside: tuple[str, ...], tmp_path: Path, tokenizer: SampleTokenizer
) -> None:
    members = [*[(name, GOOD) for name in names], ("k.txt", b"one")]
    _, reasons, (sample,) = index_tar(write_tar(tmp_path / "x.tar", members), tokenizer)
    assert len(sample.images) == pictures
    assert reasons == ({BESIDE: len(beside)} if beside else {})
    listed = [json.loads(line)["key"] for line in (tmp_path / "x.index.rejected.jsonl").read_text().splitlines()]
    assert tuple(listed) == beside


def test_names_with_dots_are_counted_one_by_one(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    members = [*pair("good", GOOD), *[file for number in range(6) for file in pair(f"v1.5_{number:03d}", GOOD)]]
    _, reasons, samples = index_tar(write_tar(tmp_path / "x.tar", members), tokenizer)
    assert reasons == {DOTTED: 6} and [sample.key for sample in samples] == ["good"]
    two = [("v1.5a.png", GOOD), ("v1.6b.png", GOOD), ("v1.5.txt", b"one"), ("z.txt", b"two")]
    assert index_tar(write_tar(tmp_path / "y.tar", two), tokenizer)[1] == {
        "several pictures without numbers, as KEY.0.png": 1
    }


@pytest.mark.parametrize(("pack", "name"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")])
def test_a_packed_tar_says_what_to_do(
    pack: Callable[[bytes], bytes], name: str, tmp_path: Path, tokenizer: SampleTokenizer
) -> None:
    tar = write_tar(tmp_path / "x.tar", pair("0", GOOD))
    tar.write_bytes(pack(tar.read_bytes()))
    with pytest.raises(
        UserError, match=rf"x.tar is compressed \({name}\), but samples are read at random.*: unpack it"
    ):
        index_tar(tar, tokenizer)


def test_names_of_files_may_be_any_bytes(
    tmp_path: Path, tokenizer: SampleTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = os.fsdecode(b"donn\xe9es")
    folder = tmp_path / odd
    folder.mkdir()
    write_tar(folder / f"{odd}.tar", pair("0", GOOD))
    words = ["--tokenizer", tokenizer.hugging_face.name_or_path, "--output", str(folder / f"{odd}.index")]
    for more in ([], ["--json"]):
        assert main(["data", "index", f"{folder}/*.tar", *words, *more]) == 0
    (folder / f"{odd}.jsonl").write_text('{"text": "x"}\n{"text": ""}\n')
    assert main(["data", "build", str(folder / f"{odd}.jsonl"), str(folder / "out"), "--prefix", odd, *words[:2]]) == 0
    capsys.readouterr().out.encode()
    assert Source(folder / f"{odd}.index").read(0).images == (GOOD,)
    assert Source(folder / "out" / f"{odd}.index").shard_of(0) == str(folder / "out" / f"{odd}-000000.tar")


def test_what_is_no_tar_is_counted_beside_the_others(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    for content in (b"", b"no tar at all" * 100, zlib.compress(b"x")):
        (tmp_path / "x.tar").write_bytes(content)
        part = index_shard(str(tmp_path / "x.tar"), tokenizer)
        assert part.rejected == [("", "shard is damaged or no uncompressed tar")]


def test_five_percent_of_damage_is_counted_exactly(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    draw = random.Random(0)
    damaged = set(draw.sample(range(200), 10))
    members = []
    for number in range(200):
        file = GOOD[: draw.randrange(len(GOOD) - 100)] if number in damaged else GOOD
        members += pair(f"{number:03d}", file)
    _, reasons, samples = index_tar(write_tar(tmp_path / "x.tar", members), tokenizer)
    assert sum(reasons.values()) == 10
    assert [int(sample.key) for sample in samples] == sorted({*range(200)} - damaged)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 6143), st.integers(0, 255)), min_size=1, max_size=12),
    length=st.integers(0, 20_000),
    format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_no_bytes_crash_the_indexer(
    tmp_path: Path, tokenizer: SampleTokenizer, flips: list[tuple[int, int]], length: int, format: int
) -> None:
    members = [
        ("n" * 120 + ".png", picture(8, 8)),
        ("n" * 120 + ".txt", b"one"),
        ("1.json", chat(("user", "a"), ("gpt", "b"))),
    ]
    tar = write_tar(tmp_path / "x.tar", members, format=format)
    content = bytearray(tar.read_bytes())
    for place, value in flips:
        content[place] = value
    tar.write_bytes(content[: max(length, 512)])
    before = files_of(tmp_path).keys()
    part = index_shard(str(tar), tokenizer)
    assert len(part.samples) + len(part.rejected) <= 8
    assert files_of(tmp_path).keys() == before


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "gpt", "<image>"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(value=JSON, name=st.sampled_from(["conversations", "messages", "caption"]), num_images=st.integers(0, 3))
def test_no_json_crashes_the_parser(value: object, name: str, num_images: int) -> None:
    try:
        _, content = parse_content(json.dumps({name: value}).encode(), True, num_images)
    except RejectedSample as rejection:
        assert len(str(rejection)) < 60
    else:
        assert content
