"""Shards and their index: what goes in comes out, at random, and what is bad is named."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from navil_megatron.config.errors import UserError
from navil_megatron.data.image_decode import decode_image, read_image_size
from navil_megatron.data.index_build import IndexReport, TokenCounter, index_shard
from navil_megatron.data.shard_index import HEADER, NOT_COUNTED, RECORD, index_path, load_index
from navil_megatron.data.shards import ShardSet, ShardWriter, expand_shards
from tests.unit.data_examples import picture, write_samples


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_layout_of_the_index_file() -> None:
    assert HEADER.itemsize == 64
    assert RECORD.itemsize == 40


def test_samples_come_back_in_any_order(tmp_path: Path) -> None:
    expected = [(f"k{i}", f"caption {i} é", picture(40 + i, 33, seed=i) if i % 3 else None) for i in range(12)]
    with ShardWriter(tmp_path, "s", samples_per_shard=5) as writer:
        for key, caption, image in expected:
            writer.write(key, caption, image, "png")
    assert [path.name for path in writer.shards] == ["s-000000.tar", "s-000001.tar", "s-000002.tar"]
    shards = ShardSet([str(path) for path in writer.shards])
    assert len(shards) == writer.report.num_samples == 12
    for index in np.random.default_rng(0).permutation(12):
        sample, (key, caption, image) = shards.read(int(index)), expected[index]
        assert (sample.key, sample.caption, sample.images) == (key, caption, () if image is None else (image,))
        assert sample.shard == str(writer.shards[index // 5])
        size = (0, 0) if image is None else (40 + index, 33)
        assert (shards.records[index]["height"], shards.records[index]["width"]) == size


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_samples(tmp_path / "a", "s", 10)[0]
    second = write_samples(tmp_path / "b", "s", 10)[0]
    assert first.read_bytes() == second.read_bytes()
    assert index_path(first).read_bytes() == index_path(second).read_bytes()


def test_fingerprint_follows_content_and_not_place(tmp_path: Path) -> None:
    same = [str(write_samples(tmp_path / name, "s", 10)[0]) for name in ("a", "b")]
    other = str(write_samples(tmp_path / "c", "s", 10, seed=1)[0])
    prints = [ShardSet([path]).fingerprint for path in (*same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_an_unfinished_shard_is_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "s") as writer:
        writer.write("k", "caption")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_img2dataset_layout_and_every_kind_of_bad_sample(tmp_path: Path) -> None:
    good, other = picture(40, 50), picture(50, 40, kind="JPEG")
    noise = bytes(range(256)) * 4
    shard = write_tar(
        tmp_path / "x.tar",
        [
            ("000.jpg", other), ("000.json", b'{"caption": "from json"}'), ("000.txt", b"from txt\n"),
            ("../up/001.png", good), ("../up/001.json", json.dumps({"caption": "json only"}).encode()),
            ("002.png", good), ("002.txt", b"\xff\xfe"),
            ("003.png", good), ("003.json", b"{"),
            ("004.png", good), ("004.json", b'{"text": "x"}'),
            ("005.png", good), ("005.txt", b"  \n"),
            ("006.png", good),
            ("007.png", good), ("007.jpg", other), ("007.txt", b"two"),
            ("008.jpg", noise), ("008.txt", b"noise"),
            ("009.jpg", b""), ("009.txt", b"empty"),
            ("010.png", good[: len(good) // 2]), ("010.txt", b"cut short"),
            ("011.png", picture(2, 500)), ("011.txt", b"strip"),
            ("000.png", good), ("000.txt", b"again"),
            ("._012.png", noise), ("012.txt", b"text alone"),
            ("d" * 90 + "/" + "n" * 80 + ".png", good), ("d" * 90 + "/" + "n" * 80 + ".txt", b"long name"),
        ],
        format=tarfile.PAX_FORMAT,
    )  # fmt: skip
    with tarfile.open(shard, "a") as tar:
        link = tarfile.TarInfo("013.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    report = IndexReport()
    index_shard(shard, report)
    shards = ShardSet([str(shard)])
    read = [shards.read(index) for index in range(len(shards))]
    assert [sample.caption for sample in read] == ["from txt", "json only", "text alone", "long name"]
    assert [sample.key for sample in read] == ["000", "../up/001", "012", "d" * 90 + "/" + "n" * 80]
    assert [sample.images for sample in read] == [(other,), (good,), (), (good,)]
    assert report.num_samples == 4
    assert report.reasons == {
        "text is not UTF-8": 1,
        "text is not JSON": 1,
        "JSON without a caption": 1,
        "empty caption": 1,
        "no caption file": 1,
        "more than one image": 1,
        "image: not a readable image file": 1,
        "image: empty file": 1,
        "image: damaged image data": 1,
        "image: aspect ratio beyond 200": 1,
        "key occurs again": 1,
        "not a regular file": 1,
    }
    assert (f"{shard}: 010", "image: damaged image data") in report.rejected


def test_headers_alone_let_a_cut_image_through(tmp_path: Path) -> None:
    whole = picture(64, 64, kind="JPEG")
    shard = write_tar(tmp_path / "x.tar", [("0.jpg", whole[: len(whole) // 2]), ("0.txt", b"cut")])
    assert len(index_shard(shard, IndexReport(), decode=True)) == 0
    assert len(index_shard(shard, IndexReport(), decode=False)) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_and_pixels_agree_on_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = picture(40, 70, kind="JPEG", exif=exif)
    assert read_image_size(file) == ((70, 40) if orientation >= 5 else (40, 70))
    image = decode_image(file)
    assert (image.height, image.width) == read_image_size(file)


def test_a_pixel_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")
    assert len(file.getvalue()) < 20_000
    shard = write_tar(tmp_path / "x.tar", [("0.png", file.getvalue()), ("0.txt", b"bomb")])
    report = IndexReport()
    index_shard(shard, report)
    assert report.reasons == {"image: more than 67108864 pixels": 1}


def test_caption_tokens_are_stored_for_one_tokenizer_and_counted_for_others(tmp_path: Path) -> None:
    calls = []

    def count(captions: list[str]) -> np.ndarray:
        calls.append(len(captions))
        return np.array([len(caption) for caption in captions])

    shard = write_tar(tmp_path / "x.tar", [("0.txt", b"four"), ("1.txt", b"seven..")])
    known, other = TokenCounter(count, b"k" * 16), TokenCounter(count, b"o" * 16)
    index_shard(shard, IndexReport(), tokens=known)
    shards = ShardSet([str(shard)])
    assert shards.caption_tokens(known).tolist() == [4, 7]
    assert calls == [2]
    assert shards.caption_tokens(other).tolist() == [4, 7]
    assert calls == [2, 2]
    index_shard(shard, IndexReport())
    assert load_index(shard)[0]["tokenizer"].tobytes() == NOT_COUNTED


def test_a_missing_or_damaged_shard_is_one_clear_line(tmp_path: Path) -> None:
    shard = write_samples(tmp_path, "s", 10)[0]
    content, index = shard.read_bytes(), index_path(shard).read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            ShardSet([str(shard)])
        assert "\n" not in str(caught.value)
        assert "s-000000.tar" in str(caught.value)

    shard.write_bytes(content[:5000])
    refused("is damaged or was replaced: it has 5000 bytes, but had .* restore it or index it anew with")
    shard.unlink()
    refused("is missing: restore it or take it out")
    shard.write_bytes(content)
    index_path(shard).write_bytes(index[:-1])
    refused(r"index .* is damaged \(\d+ bytes, expected \d+\)")
    index_path(shard).write_bytes(b"something else" * 10)
    refused("is damaged or of another version")
    index_path(shard).unlink()
    refused("has no index s-000000.tar.index beside it: index it anew with: navil-megatron data index")
    shard.write_bytes(content[:5000])
    with pytest.raises(UserError, match="is not a whole, uncompressed tar"):
        index_shard(shard, IndexReport())
    shard.write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match="is not a whole, uncompressed tar"):
        index_shard(shard, IndexReport())


def test_a_shard_that_shrinks_while_it_is_read_is_one_clear_line(tmp_path: Path) -> None:
    shard = write_samples(tmp_path, "s", 10)[0]
    shards = ShardSet([str(shard)])
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(UserError, match="is damaged, it does not fit its index"):
        shards.read(8)
    shard.unlink()
    with pytest.raises(UserError, match="can no longer be opened"):
        shards.read(8)


def test_patterns_keep_their_order_and_must_match(tmp_path: Path) -> None:
    for name in ("b-1.tar", "b-0.tar", "a-0.tar"):
        (tmp_path / name).touch()
    found = expand_shards([f"{tmp_path}/b-*.tar", f"{tmp_path}/a-*.tar"], "data.train_shards")
    assert [Path(path).name for path in found] == ["b-0.tar", "b-1.tar", "a-0.tar"]
    with pytest.raises(UserError, match=r"data.train_shards: no shard matches '.*c-\*.tar'"):
        expand_shards([f"{tmp_path}/c-*.tar"], "data.train_shards")
    with pytest.raises(UserError, match=r"a-0\.tar is matched twice"):
        expand_shards([f"{tmp_path}/*.tar", f"{tmp_path}/a-0.tar"], "data.train_shards")
