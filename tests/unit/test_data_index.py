"""From tars to one index: what it holds, that it is small, that the work is shared and resumed, and remote shards."""

import json
import signal
import zipfile
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from navil_megatron.config.errors import UserError
from navil_megatron.data.image_decode import decode_image, read_image_size
from navil_megatron.data.shards.index_report import describe_index_report, report_index
from navil_megatron.data.shards.index_shards import index_shards
from navil_megatron.data.shards.pieces import pieces_folder
from navil_megatron.data.shards.shard_index import HEADER, IMAGE, SAMPLE
from navil_megatron.data.shards.source import Source
from navil_megatron.data.tokenizer import SampleTokenizer
from navil_megatron.data.types import Turn
from tests.unit.range_server import served
from tests.unit.shard_examples import (
    DeadlyCounter,
    DieAt,
    exit_code,
    files_of,
    index_tar,
    picture,
    small_tokenizer,
    write_tar,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SampleTokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_shards(folder: Path, num_shards: int = 3, per_shard: int = 4) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for shard in range(num_shards):
        members = []
        for number in range(per_shard):
            name = f"{shard}-{number}"
            members += [(f"{name}.png", picture(40 + number, 33, seed=shard)), (f"{name}.txt", f"red {name}".encode())]
        shards.append(write_tar(folder / f"s-{shard}.tar", [*members, (f"{shard}-bad.txt", b"\xff")]))
    return shards


def test_an_index_is_small(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    assert (HEADER.itemsize, SAMPLE.itemsize, IMAGE.itemsize) == (80, 24, 16)
    image = picture(32, 32)
    members = [
        (f"{number:04d}.{ending}", file) for number in range(500) for ending, file in (("png", image), ("txt", b"one"))
    ]
    source, _, _ = index_tar(write_tar(tmp_path / "x.tar", members), tokenizer, decode=False)
    assert source.index.path.stat().st_size <= 500 * 40 + HEADER.itemsize + 200


def test_images_come_in_natural_order_and_text_in_every_form(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    a, b, c = picture(40, 50), picture(50, 40, kind="JPEG"), picture(33, 44, kind="WEBP")
    llava = [
        {"from": "system", "value": "short"},
        {"from": "human", "value": "<image>\n<image>\nwhich of <image>\n?"},
        {"from": "gpt", "value": "the <image>"},
    ]
    openai = [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "<image>?"}],
        },
        {"role": "assistant", "content": "yes"},
    ]
    tar = write_tar(
        tmp_path / "x.tar",
        [
            ("a.10.png", c), ("a.2.jpg", b), ("a.11.png", a),
            ("a.json", json.dumps({"conversations": llava}).encode()),
            ("b.jpg", b), ("b.json", json.dumps({"messages": openai}).encode()), ("b.txt", b"not this"),
            ("c.jpg", b), ("c.json", b'{"caption": "json"}'), ("c.txt", b"  txt\n"),
            ("d.jpg", b), ("d.json", b'{"caption": " from json "}'),
            ("e.json", b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}'),
            ("f.0.png", a), ("f.1.png", c),
            ("f.json", b'{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}'),
            ("g.txt", "\ufefftext é".encode()),
            ("h.png", a), ("h.json", b'{"caption": null}'), ("h.txt", b"from txt"),
        ],
    )  # fmt: skip
    source, reasons, samples = index_tar(tar, tokenizer)
    assert reasons == {}
    assert {sample.key: (sample.images, sample.content) for sample in samples} == {
        "a": (
            (b, c, a),
            (
                Turn("system", ("short",)),
                Turn("user", (None, None, "which of ", None, "\n?")),
                Turn("assistant", ("the <image>",)),
            ),
        ),
        "b": ((b,), (Turn("user", (None, "<image>?")), Turn("assistant", ("yes",)))),
        "c": ((b,), "txt"),
        "d": ((b,), "from json"),
        "e": ((), (Turn("user", ("hi",)), Turn("assistant", ("ho",)))),
        "f": ((a, c), (Turn("user", (None, None, "hi")), Turn("assistant", ("ho",)))),
        "g": ((), "text é"),
        "h": ((a,), "from txt"),
    }
    for sample, record in zip(samples, source.index.samples, strict=True):
        pieces = tokenizer.pieces(sample.content, len(sample.images))
        assert record["text_tokens"] == sum(len(piece.ids) for piece in pieces)
    first = int(source.index.samples[0]["first_image"])
    assert source.index.images[first : first + 3][["height", "width"]].tolist() == [(50, 40), (33, 44), (40, 50)]
    assert source.read_image(0, 1) == c
    assert source.read(0, images=False).images == ()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_are_those_of_the_upright_picture(tmp_path: Path, tokenizer: SampleTokenizer, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = picture(40, 70, kind="JPEG", exif=exif)
    source, _, _ = index_tar(write_tar(tmp_path / "x.tar", [("0.jpg", file), ("0.txt", b"one")]), tokenizer)
    expected = (70, 40) if orientation >= 5 else (40, 70)
    assert source.index.images[0][["height", "width"]].item() == expected == read_image_size(file, 2**26)
    image = decode_image(file, 2**26)
    assert (image.height, image.width) == expected


def test_jobs_do_not_change_a_byte(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    write_shards(tmp_path)
    ticks: list[tuple[int, int]] = []
    found = []
    for jobs in (1, 2):
        report = index_shards(
            [f"{tmp_path}/*.tar"], tmp_path / "x.index", tokenizer, jobs=jobs, on_progress=lambda *t: ticks.append(t)
        )
        found.append((report, files_of(tmp_path)))
    assert found[0] == found[1]
    assert ticks == [(0, 3), (1, 3), (2, 3), (3, 3)] * 2
    assert report["num_samples"] == 12 and report["rejected_reasons"] == {"text is not UTF-8": 3}
    listed = [json.loads(line) for line in (tmp_path / "x.index.rejected.jsonl").read_text().splitlines()]
    assert listed[1] == {"shard": "s-1.tar", "key": "1-bad", "reason": "text is not UTF-8"}
    assert not pieces_folder(tmp_path / "x.index").exists()


def test_an_interrupted_run_goes_on_with_what_still_fits(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    shards = write_shards(tmp_path)
    index = tmp_path / "x.index"

    def killed(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    def ticks() -> list[int]:
        seen: list[int] = []

        def stop(done: int, total: int) -> None:
            seen.append(done)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            index_shards([f"{tmp_path}/*.tar"], index, tokenizer, on_progress=stop)
        return seen

    with pytest.raises(KeyboardInterrupt):
        index_shards([f"{tmp_path}/*.tar"], index, tokenizer, on_progress=killed)
    assert not index.exists()
    assert ticks() == [2]
    write_tar(shards[0], [("new.txt", b"other")])
    assert ticks() == [1]
    (pieces_folder(index) / "unfinished.index.partial").write_bytes(b"half")
    next(pieces_folder(index).glob("*.index")).write_bytes(b"half")
    report = index_shards([f"{tmp_path}/*.tar"], index, tokenizer)
    assert report["num_samples"] == 9
    assert Source(index).key(0) == "new"


def test_a_killed_process_leaves_no_half_index(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    write_shards(tmp_path / "whole")
    write_shards(tmp_path / "cut")
    index_shards([f"{tmp_path}/whole/*.tar"], tmp_path / "whole" / "x.index", tokenizer)
    cut = tmp_path / "cut"
    for _ in range(2):  # the second run dies as it tells of the one shard that is done
        code = exit_code(index_shards, [f"{cut}/*.tar"], cut / "x.index", tokenizer, on_progress=DieAt(1))
        assert code == -signal.SIGKILL
    assert not (tmp_path / "cut" / "x.index").exists()
    index_shards([f"{tmp_path}/cut/*.tar"], tmp_path / "cut" / "x.index", tokenizer)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_a_killed_worker_is_one_clear_line(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    write_shards(tmp_path)
    with pytest.raises(UserError, match="a process was killed, .* run the same again with fewer --jobs, it goes on"):
        index_shards([f"{tmp_path}/*.tar"], tmp_path / "x.index", DeadlyCounter(tokenizer.fingerprint), jobs=2)


def test_headers_alone_let_a_cut_image_through(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    whole = picture(64, 64, kind="JPEG")
    tar = write_tar(tmp_path / "x.tar", [("0.jpg", whole[: len(whole) // 2]), ("0.txt", b"cut"), ("1.txt", b"good")])
    assert index_tar(tar, tokenizer)[1] == {"image: damaged image data": 1}
    assert index_tar(tar, tokenizer, decode=False)[1] == {}


def test_shards_may_lie_anywhere(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    (shard,) = write_shards(tmp_path / "shards", 1)
    index_shards([str(shard)], tmp_path / "local.index", tokenizer)
    expected = [Source(tmp_path / "local.index").read(number) for number in range(4)]
    assert Source(tmp_path / "local.index").index.shards[0].path == "shards/s-0.tar"
    fsspec.filesystem("memory").pipe("/folder/s-0.tar", shard.read_bytes())
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(shard, "in/s-0.tar")
    with served(tmp_path / "shards") as url:
        patterns = {
            "memory": "memory://folder/*.tar",
            "zip": f"zip://in/*.tar::file://{tmp_path}/a.zip",
            "file": f"file://{tmp_path}/shards/s-?.tar",
            "http": f"{url}/s-0.tar",
        }
        for name, pattern in patterns.items():
            index_shards([pattern], tmp_path / f"{name}.index", tokenizer)
            source = Source(tmp_path / f"{name}.index")
            source.check_shards(urls=True)
            found = [source.read(number) for number in range(4)]
            assert [(s.key, s.content, s.images) for s in found] == [(s.key, s.content, s.images) for s in expected]
            assert source.index.fingerprint == Source(tmp_path / "local.index").index.fingerprint
    fsspec.filesystem("memory").pipe("/folder/s-0.tar", b"short")
    with pytest.raises(UserError, match="memory://.*s-0.tar was replaced or is damaged: it has 5 bytes, but had"):
        Source(tmp_path / "memory.index").read(0)
    with pytest.raises(UserError, match="cannot be opened: [Ii]nstall"):
        index_shards(["oci://bucket/*.tar"], tmp_path / "x.index", tokenizer)
    with pytest.raises(UserError, match="cannot be listed .*: check the URL"):
        index_shards(["nowhere://x/*.tar"], tmp_path / "x.index", tokenizer)


def test_patterns_keep_their_order_and_must_match(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    for name in ("b-1.tar", "b-0.tar", "a-0.tar"):
        write_tar(tmp_path / name, [("0.txt", name.encode())])
    index = tmp_path / "sub" / "x.index"
    report = index_shards([f"{tmp_path}/b-*.tar", f"{tmp_path}/a-0.tar"], index, tokenizer)
    assert report["shards"] == [f"{tmp_path}/{name}.tar" for name in ("b-0", "b-1", "a-0")]
    with pytest.raises(UserError, match=r"no shard matches '.*c-\*.tar'"):
        index_shards([f"{tmp_path}/c-*.tar"], index, tokenizer)
    with pytest.raises(UserError, match=r"a-0\.tar is matched twice"):
        index_shards([f"{tmp_path}/*.tar", f"{tmp_path}/a-0.tar"], index, tokenizer)


def test_the_report_counts_what_is_there(tmp_path: Path, tokenizer: SampleTokenizer) -> None:
    chat = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    members = [("0.txt", b"xyzzy"), ("1.0.png", picture(40, 80)), ("1.1.png", picture(64, 32)), ("1.json", chat)]
    tar = write_tar(tmp_path / "x.tar", members)
    source, _, _ = index_tar(tar, tokenizer)
    report = report_index(source.index.path)
    assert (report["num_samples"], report["num_conversations"], report["num_without_images"]) == (2, 1, 1)
    assert (report["num_images"], report["most_images_of_a_sample"]) == (2, 2)
    assert report["image_bytes"] == len(members[1][1]) + len(members[2][1])
    assert report["image_quantiles"]["pixels"] == {
        "0.0": 2048,
        "0.1": 2048,
        "0.5": 2048,
        "0.9": 3200,
        "0.99": 3200,
        "1.0": 3200,
    }
    counts = source.index.samples["text_tokens"].tolist()
    assert report["text_tokens"] == sum(counts)
    assert report["text_token_histogram"] == {str(2 ** (count.bit_length() - 1)): 1 for count in sorted(counts)}
    assert report["shard_bytes"] == tar.stat().st_size
    assert "1 conversations, 1 samples without images, 2 images" in describe_index_report(report)
