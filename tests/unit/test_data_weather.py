"""Shards behind a network that has bad days: a web server that fails, closes early or stalls, and a real S3 server."""

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from navil_megatron.cli import main
from navil_megatron.config.data import RemoteConfig
from navil_megatron.config.errors import NetworkError, UserError
from navil_megatron.data.shards import remote_file
from navil_megatron.data.shards.index_shards import index_shards
from navil_megatron.data.shards.source import Source
from navil_megatron.data.tokenizer import SampleTokenizer
from tests.unit.range_server import Mood, served
from tests.unit.shard_examples import picture, small_tokenizer, write_tar

NUM_SAMPLES = 8
THREE = RemoteConfig(tries=3, timeout_seconds=0.5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SampleTokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    files = [[(f"{n}.png", picture(40, 50, seed=n)), (f"{n}.txt", b"red %d" % n)] for n in range(NUM_SAMPLES)]
    write_tar(folder / "s.tar", [file for pair in files for file in pair])
    return folder


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_file, "_FIRST_PAUSE_SECONDS", 0.001)


def contents(source: Source) -> list[str]:
    return [str(source.read(number).content) for number in range(len(source))]


ALL = [f"red {number}" for number in range(NUM_SAMPLES)]
MOODS: dict[str, Mood] = {
    "500": lambda number: "500" if number % 3 else "",
    "503": lambda number: "503" if number % 3 else "",
    "429": lambda number: "429" if number % 3 else "",
    "closes early": lambda number: "close" if number % 2 == 0 else "",
    "stalls once": lambda number: "stall" if number == 3 else "",
}


@pytest.mark.parametrize("mood", MOODS)
def test_what_the_network_spoils_is_read_again(
    mood: str, shards: Path, tmp_path: Path, tokenizer: SampleTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    index = tmp_path / "x.index"
    with served(shards, MOODS[mood]) as url:
        source = Source(index, THREE) if index_shards([f"{url}/s.tar"], index, tokenizer) else None
        assert source is not None and contents(source) == ALL
    assert "/s.tar: " in caplog.text and " of 3 in 0.0 s" in caplog.text


@pytest.mark.parametrize(
    ("mood", "reason"),
    [("500", "500, message="), ("stall", "nothing came within 0.5 s"), ("close", "Response payload")],
)
def test_a_network_that_gives_up_is_nobodys_mistake(
    mood: str, reason: str, shards: Path, tmp_path: Path, tokenizer: SampleTokenizer
) -> None:
    is_bad = []
    index = tmp_path / "x.index"
    with served(shards, lambda _: mood if is_bad else "") as url:
        index_shards([f"{url}/s.tar"], index, tokenizer)
        source = Source(index, THREE)
        is_bad.append(True)
        begun = time.monotonic()
        with pytest.raises(NetworkError, match=r"/s\.tar gave no good answer, tried 3 times \(.*\): run the") as error:
            source.read(1)
        assert reason in str(error.value) and "\n" not in str(error.value) and error.value.exit_code == 1
        assert time.monotonic() - begun < 20


def test_what_no_other_try_would_change_is_said_at_once(
    shards: Path, tmp_path: Path, tokenizer: SampleTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    is_bad, index = [], tmp_path / "x.index"
    with served(shards, lambda _: "403" if is_bad else "") as url:
        index_shards([f"{url}/s.tar"], index, tokenizer)
        source = Source(index)
        is_bad.append(True)
        with pytest.raises(UserError, match="cannot be read .*403.*: restore it or its connection") as error:
            source.read(1)
        assert error.value.exit_code == 2
        with pytest.raises(UserError, match="no shard matches"):
            index_shards([f"{url}/none.tar"], tmp_path / "y.index", tokenizer)
    assert "try 2 of" not in caplog.text


def test_exit_code_of_a_network_that_is_away(
    monkeypatch: pytest.MonkeyPatch, shards: Path, tmp_path: Path, tokenizer: SampleTokenizer, capsys: Any
) -> None:
    monkeypatch.setattr(remote_file, "USUAL", THREE)
    monkeypatch.setattr("navil_megatron.data.shards.shard_files.USUAL", THREE)
    with served(shards) as url:
        pass
    words = ["data", "index", f"{url}/s.tar", "--output", str(tmp_path / "x.index")]
    assert main([*words, "--tokenizer", tokenizer.hugging_face.name_or_path]) == 1
    assert f"error: {url}/s.tar gave no good answer, tried 3 times (Cannot connect to host" in capsys.readouterr().err


class _Store:
    """An S3 server on this machine, whose answers a test may spoil."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.application, self.spoil = DomainDispatcherApplication(create_backend_app), None
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, environment: dict[str, Any], start: Any) -> Any:
        if self.spoil and self.spoil(environment):
            start("503 Slow Down", [("Content-Length", "0")])
            return []
        return self.application(environment, start)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Store]:
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    found = _Store()
    monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
    thread = threading.Thread(target=found.server.serve_forever, daemon=True)
    thread.start()
    yield found
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    found.server.shutdown()
    thread.join()


def test_shards_in_s3(
    store: _Store,
    shards: Path,
    tmp_path: Path,
    tokenizer: SampleTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    s3 = fsspec.filesystem("s3")
    monkeypatch.setattr(type(s3), "retries", 1)  # its own tries take seconds, and are not what is tested
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3.mkdir("bucket")
    s3.put(str(shards / "s.tar"), "bucket/web/s.tar")
    s3.invalidate_cache()
    requests = itertools.count()
    store.spoil = lambda _: next(requests) % 3 == 0
    index = tmp_path / "x.index"
    report = index_shards(["s3://bucket/web/*.tar"], index, tokenizer)
    assert report["shards"] == ["s3://bucket/web/s.tar"] and contents(Source(index)) == ALL
    assert "s3://bucket/web/s.tar: " in caplog.text and "try 2 of 6" in caplog.text
    store.spoil = lambda environment: environment["REQUEST_METHOD"] == "GET"
    with pytest.raises(NetworkError, match="s3://bucket/web/s.tar gave no good answer, tried 2 times"):
        Source(index, RemoteConfig(tries=2)).read(0)
    s3.invalidate_cache()
    with pytest.raises(NetworkError, match=r"s3://bucket/web/\*.tar gave no good answer"):
        index_shards(["s3://bucket/web/*.tar"], tmp_path / "y.index", tokenizer)
    store.spoil = None
    s3.rm("bucket/web/s.tar")
    s3.invalidate_cache()
    with pytest.raises(UserError, match="s3://bucket/web/s.tar is missing: restore it") as error:
        Source(index).read(0)
    assert error.value.exit_code == 2
