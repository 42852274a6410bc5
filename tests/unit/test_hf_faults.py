"""Real faults: killed processes, full disks, damaged and hostile files. Each is one line, and nothing is lost."""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from navil_megatron.cli import main
from navil_megatron.config.errors import UserError
from navil_megatron.files.checksums import CHECKSUMS_FILE
from navil_megatron.files.disk_space import require_space
from navil_megatron.hf.compare import compare_weights
from navil_megatron.hf.export import convert_to_hf
from navil_megatron.hf.ingest import convert_from_hf
from navil_megatron.hf.safetensors_io import INDEX_FILE
from tests.unit.hf_examples import tiny_model, write_checkpoint

KILLS, MANY_KILLS = 12, 300
PRELOAD = ["navil_megatron.hf.export", "navil_megatron.hf.ingest", "tests.unit.hf_examples"]
CONVERT = {"to-hf": convert_to_hf, "from-hf": convert_from_hf}
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each direction converts from: a checkpoint, and a folder of several files."""
    folder = tmp_path_factory.mktemp("sources")
    write_checkpoint(folder / "checkpoint", tiny_model(num_layers=12))
    convert_to_hf(folder / "checkpoint", folder / "hf", max_file_bytes=200_000)
    (folder / "hf" / CHECKSUMS_FILE).unlink()
    return {"to-hf": folder / "checkpoint", "from-hf": folder / "hf"}


@pytest.fixture
def damaged(sources: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies of the sources, to be spoiled."""
    return {name: Path(shutil.copytree(source, tmp_path / source.name)) for name, source in sources.items()}


def fingerprint(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(capsys: pytest.CaptureFixture[str], direction: str, source: Path, target: Path, status: int = 2) -> str:
    """The one line of a conversion that cannot be done; nothing is left of it and the source is as it was."""
    before = fingerprint(source)
    assert main(["convert", direction, str(source), str(target)]) == status
    lines = capsys.readouterr().err.splitlines()
    problems = [line for line in lines if line.startswith("error: ")]
    assert [line for line in lines if line.strip() and "━" not in line] == problems
    assert len(problems) == 1
    assert not target.exists() or not any(target.iterdir())
    assert not target.with_name(f"{target.name}.partial").exists()
    assert fingerprint(source) == before
    return problems[0]


# Killed


def _convert(direction: str, source: str, target: str, started: Any) -> None:
    started.set()
    CONVERT[direction](Path(source), Path(target))


def start(direction: str, source: Path, target: Path) -> Any:
    """A conversion in a process of its own, which is forked with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    started = context.Event()
    process = context.Process(target=_convert, args=(direction, str(source), str(target), started))
    process.start()
    assert started.wait(60)
    return process


def check_kills(direction: str, source: Path, tmp_path: Path, count: int) -> None:
    before = fingerprint(source)
    process = start(direction, source, tmp_path / "whole")
    begun = time.monotonic()
    process.join()
    usual = time.monotonic() - begun
    whole = fingerprint(tmp_path / "whole")
    draw = random.Random(5)
    target = tmp_path / "target"
    partial, outcomes = tmp_path / "target.partial", set()
    for _ in range(count):
        process = start(direction, source, target)
        time.sleep(draw.uniform(0, usual))
        process.kill()
        process.join()
        if target.exists():
            outcomes.add("complete")
            assert fingerprint(target) == whole
            shutil.rmtree(target)
        elif partial.exists():
            outcomes.add("partial")
            found = fingerprint(partial)
            if found != whole:
                with pytest.raises(UserError):
                    compare_weights(source, partial)
    assert "partial" in outcomes
    process = start(direction, source, target)
    process.join()
    assert process.exitcode == 0
    assert fingerprint(target) == whole
    assert not partial.exists()
    assert fingerprint(source) == before


@pytest.mark.parametrize("direction", CONVERT)
def test_killed_at_any_moment(direction: str, sources: dict[str, Path], tmp_path: Path) -> None:
    check_kills(direction, sources[direction], tmp_path, KILLS)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("direction", CONVERT)
def test_killed_at_many_more_moments(direction: str, sources: dict[str, Path], tmp_path: Path) -> None:
    check_kills(direction, sources[direction], tmp_path, MANY_KILLS)


def test_workers_end_with_a_killed_conversion(tmp_path: Path) -> None:
    """With workers of its own, killed while they write; nobody goes on writing."""
    write_checkpoint(tmp_path / "checkpoint", tiny_model(num_layers=40, hidden_size=256, ffn_hidden_size=2048))
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    code = (
        "import sys; from pathlib import Path\n"
        "from navil_megatron.hf import ingest\n"
        "from navil_megatron.hf.checkpoint import writer\n"
        "writer.CheckpointWriter.__init__.__defaults__ = (5_000_000,)\n"
        "if __name__ == '__main__': ingest.convert_from_hf(Path('hf'), Path('target'), num_processes=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    while not any((tmp_path / "target.partial").glob("*.distcp")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while _writers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _writers(tmp_path)
    assert not (tmp_path / "target").exists()
    convert_from_hf(tmp_path / "hf", tmp_path / "target")
    assert compare_weights(tmp_path / "hf", tmp_path / "target")["equal"]


def _writers(folder: Path) -> list[str]:
    """Processes that work in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").resolve() == folder.resolve():
                found.append(entry.name)
        except OSError:
            continue  # it has ended
    return found


def test_two_conversions_to_one_target(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    process = start("to-hf", sources["to-hf"], target)
    partial = target.with_name("target.partial")
    while not (partial.exists() and any(partial.iterdir())):  # a folder alone may not be locked yet
        assert process.is_alive()
    os.kill(process.pid, signal.SIGSTOP)
    try:
        assert main(["convert", "to-hf", str(sources["to-hf"]), str(target)]) == 2
        assert "is being written by another process; wait for it, or stop it" in capsys.readouterr().err
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0
    assert compare_weights(sources["to-hf"], target)["equal"]
    assert "exists already" in str(_error(lambda: convert_to_hf(sources["to-hf"], target)))


def _error(run: Callable[[], Any]) -> UserError:
    with pytest.raises(UserError) as error:
        run()
    return error.value


# The disk


def _limited(direction: str, source: str, target: str, limit: int, told: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        CONVERT[direction](Path(source), Path(target))
    except OSError as error:
        told.put(error.errno)


@pytest.mark.parametrize("direction", CONVERT)
def test_file_that_cannot_grow(direction: str, sources: dict[str, Path], tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    told = context.Queue()
    arguments = (direction, str(sources[direction]), str(tmp_path / "target"), 100_000, told)
    process = context.Process(target=_limited, args=arguments)
    process.start()
    assert told.get(timeout=60) == errno.EFBIG
    process.join()
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_said_before_anything_is_read(tmp_path: Path) -> None:
    message = str(_error(lambda: require_space(tmp_path, 10**18)))
    assert message.startswith(f"{tmp_path.parent} has ")
    assert "1,000,000,000,000 MB are needed" in message


@pytest.mark.parametrize("direction", CONVERT)
def test_full_disk(
    direction: str, sources: dict[str, Path], small_disk: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk("size=64k")
    assert "MB are needed" in refused(capsys, direction, sources[direction], disk / "target")
    total = sum(path.stat().st_size for path in sources["from-hf"].glob("*.safetensors"))
    small_disk(f"remount,size={total + 40_000}")
    line = refused(capsys, direction, sources[direction], disk / "target", status=1)
    assert "No space left on device" in line
    small_disk("remount,size=64m")
    assert main(["convert", direction, str(sources[direction]), str(disk / "target")]) == 0


def test_disk_that_may_not_be_written(
    sources: dict[str, Path], small_disk: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk("ro")
    assert "Read-only file system" in refused(capsys, "to-hf", sources["to-hf"], disk / "target")


def test_target_under_a_file(sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("keep")
    for direction, source in sources.items():
        assert main(["convert", direction, str(source), str(tmp_path / "file" / "target")]) == 2
        assert capsys.readouterr().err.count("error: ") == 1
        assert main(["convert", direction, str(source), str(tmp_path / "file")]) == 2
        assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "keep"


# Damaged folders


def _rewrite(path: Path, change: Callable[[bytearray], Any]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def _flip(content: bytearray, place: int) -> None:
    content[place] ^= 1


def _header(path: Path, change: Callable[[dict], Any]) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _weights(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def _index(folder: Path, change: Callable[[dict], Any]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def _config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        section, _, key = name.partition("__")
        (config[section] if key else config)[key or name] = value
    (folder / "config.json").write_text(json.dumps(config))


BROKEN_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated file": (
        lambda f: _rewrite(_weights(f), lambda c: c.__delitem__(slice(-1000, None))),
        "cannot be read as",
    ),
    "empty file": (lambda f: _weights(f).write_bytes(b""), "cannot be read as safetensors"),
    "bit flip in a header": (lambda f: _rewrite(_weights(f), lambda c: _flip(c, 3)), "cannot be read as safetensors"),
    "unknown type": (
        lambda f: _header(_weights(f), lambda h: h[next(iter(h.keys() - {"__metadata__"}))].update(dtype="F7")),
        "cannot be read as safetensors",
    ),
    "missing file": (lambda f: _weights(f).unlink(), "which its index names"),
    "file outside": (lambda f: _index(f, lambda m: m.update({next(iter(m)): "../x"})), "inside the folder"),
    "absolute file": (lambda f: _index(f, lambda m: m.update({next(iter(m)): "/etc/passwd"})), "inside the folder"),
    "file that is dot-dot": (lambda f: _index(f, lambda m: m.update({next(iter(m)): ".."})), "inside the folder"),
    "file that is no text": (lambda f: _index(f, lambda m: m.update({next(iter(m)): 7})), "not a safetensors index"),
    "key in another file": (
        lambda f: _index(f, lambda m: m.update({next(iter(m)): sorted(m.values())[-1]})),
        "does not fit its files in 1 of",
    ),
    "key nowhere": (lambda f: _index(f, lambda m: m.update({"more": next(iter(m.values()))})), "more (nowhere)"),
    "link out": (
        lambda f: _weights(f, 0).symlink_to(_weights(f, 0).rename(f.parent / "elsewhere")),
        "outside the folder",
    ),
    "config that is not JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "config that is not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "cannot be read as JSON"),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "config of deep lists": (lambda f: (f / "config.json").write_text("[" * 100_000), "cannot be read as JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "neither a checkpoint"),
    "no sections": (lambda f: (f / "config.json").write_text('{"model_type": "navil_chat"}'), "llm_config"),
    "text for a number": (lambda f: _config(f, llm_config__hidden_size="48"), "config.json"),
    "list for a number": (lambda f: _config(f, llm_config__num_attention_heads=[6]), "config.json"),
    "text for a section": (lambda f: _config(f, vision_config="none"), "config.json"),
    "no heads": (lambda f: _config(f, llm_config__num_attention_heads=0), "config.json"),
    "negative": (lambda f: _config(f, llm_config__num_hidden_layers=-1), "config.json"),
    "huge": (lambda f: _config(f, llm_config__num_hidden_layers=10**9), "larger than any model"),
    "huge width": (lambda f: _config(f, llm_config__hidden_size=10**18), "larger than any model"),
    "huge float": (lambda f: _config(f, llm_config__vocab_size=1e300), "config.json"),
    "other width": (lambda f: _config(f, llm_config__intermediate_size=57), "does not fit its config"),
    "one layer more": (lambda f: _config(f, vision_config__num_hidden_layers=13), "is missing"),
    "ids that are text": (lambda f: _config(f, special_token_ids=[str(n) for n in range(12)]), "config.json"),
    "images that are text": (lambda f: _config(f, min_dynamic_patch="many"), "config.json"),
    "ratio of nothing": (lambda f: _config(f, downsample_ratio=0), "config.json"),
}


@pytest.mark.parametrize("fault", BROKEN_FOLDERS)
def test_damaged_folder(
    fault: str, damaged: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BROKEN_FOLDERS[fault]
    damage(damaged["from-hf"])
    line = refused(capsys, "from-hf", damaged["from-hf"], tmp_path / "target")
    assert message in line
    assert len(line) < 1500


# Damaged checkpoints


def _metadata(folder: Path, change: Callable[[Any], Any]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _place(metadata: Any, key: str = "connector.norm.bias") -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == key)


class _Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def _replace_entry(folder: Path, pickled: bytes, numbers: bytes) -> None:
    """Puts an archive of its own in the place of a tensor's."""
    path = folder / "__0_9.distcp"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", numbers)
        archive.writestr("archive/version", "3\n")

    def point_to_it(metadata: Any) -> None:
        place = _place(metadata)
        place.relative_path, place.offset, place.length = path.name, 0, path.stat().st_size

    _metadata(folder, point_to_it)


def _archive_with_bomb(folder: Path) -> None:
    """The entry of a tensor whose pickle is a bomb."""
    _replace_entry(folder, pickle.dumps(_Bomb(folder.parent / "exploded"), protocol=2), b"\0" * 512)


def _archive_beyond_its_numbers(folder: Path) -> None:
    """The entry of a tensor that starts after the first of as many numbers as it has."""
    saved = io.BytesIO()
    torch.save(torch.zeros(129)[1:], saved)
    with zipfile.ZipFile(saved) as archive:
        pickled = archive.read("archive/data.pkl").replace(b"K\x81tq", b"K\x80tq")
    _replace_entry(folder, pickled, b"\0" * 512)


def _exchange(metadata: Any) -> None:
    one, other = _place(metadata), _place(metadata, "vision_encoder.patch_embedding.bias")
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__


def _overlap(metadata: Any) -> None:
    entry = metadata.state_dict_metadata["connector.norm.bias"]
    entry.chunks.append(entry.chunks[0])


BROKEN_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no .metadata": (lambda f: (f / ".metadata").unlink(), "its save was cut short"),
    "no metadata.json": (lambda f: (f / "metadata.json").unlink(), "not a complete megatron-core checkpoint"),
    "no file": (lambda f: (f / "__0_0.distcp").unlink(), "lacks __0_0.distcp: its save was cut short"),
    "truncated file": (lambda f: os.truncate(f / "__0_0.distcp", 300_000), "has 300000 bytes, expected"),
    "truncated .metadata": (
        lambda f: _rewrite(f / ".metadata", lambda c: c.__delitem__(slice(-50, None))),
        ".metadata",
    ),
    "empty .metadata": (lambda f: (f / ".metadata").write_bytes(b""), ".metadata"),
    "bomb in .metadata": (
        lambda f: (f / ".metadata").write_bytes(pickle.dumps(_Bomb(f.parent / "exploded"))),
        "holds 'posix.system', which is not part of such data",
    ),
    "bomb within .metadata": (
        lambda f: _metadata(f, lambda m: setattr(m, "planner_data", _Bomb(f.parent / "exploded"))),
        "holds 'posix.system'",
    ),
    "bomb in an entry": (_archive_with_bomb, "holds 'posix.system'"),
    "entry beyond its numbers": (_archive_beyond_its_numbers, "describes a tensor that is larger than its numbers"),
    "file outside": (
        lambda f: _metadata(f, lambda m: setattr(_place(m), "relative_path", "../__0_0.distcp")),
        "expected file names inside the folder",
    ),
    "absolute file": (
        lambda f: _metadata(f, lambda m: setattr(_place(m), "relative_path", "/etc/passwd")),
        "expected file names inside the folder",
    ),
    "negative offset": (lambda f: _metadata(f, lambda m: setattr(_place(m), "offset", -5)), "lacks a size"),
    "offset of text": (lambda f: _metadata(f, lambda m: setattr(_place(m), "offset", "0")), "lacks a size"),
    "offset beyond": (lambda f: _metadata(f, lambda m: setattr(_place(m), "offset", 10**15)), "bytes, expected"),
    "other entry": (
        lambda f: _metadata(f, lambda m: setattr(_place(m), "offset", _place(m, "connector.norm.weight").offset + 8)),
        "has entries of __0_0.distcp that overlap",
    ),
    "entry over the next one": (
        lambda f: _metadata(f, lambda m: setattr(_place(m), "length", _place(m).length + 3000)),
        "has entries of __0_0.distcp that overlap",
    ),
    "entries exchanged": (lambda f: _metadata(f, _exchange), "holds [128], where the metadata says [32]"),
    "chunks that overlap": (lambda f: _metadata(f, _overlap), "has chunks of connector.norm.bias that overlap"),
    "chunks with a gap": (
        lambda f: _metadata(f, lambda m: m.state_dict_metadata["connector.norm.bias"].chunks.clear()),
        "has too few chunks of connector.norm.bias",
    ),
    "chunk outside": (
        lambda f: _metadata(
            f, lambda m: setattr(m.state_dict_metadata["connector.norm.bias"].chunks[0], "sizes", torch.Size([10**12]))
        ),
        "lies outside",
    ),
    "huge tensor": (
        lambda f: _metadata(
            f, lambda m: setattr(m.state_dict_metadata["connector.norm.bias"], "size", torch.Size([2**61, 2**61]))
        ),
        "connector.norm.bias",
    ),
    "no config": (lambda f: (f / "navil_config.json").unlink(), "navil_config.json"),
    "config without a model": (lambda f: (f / "navil_config.json").write_text("{}"), "has no model section"),
    "config of another model": (
        lambda f: (f / "navil_config.json").write_text(
            (f / "navil_config.json").read_text().replace('"num_layers": 12', '"num_layers": 11')
        ),
        "does not fit its config",
    ),
    "config with text": (
        lambda f: (f / "navil_config.json").write_text(
            (f / "navil_config.json").read_text().replace('"hidden_size": 48', '"hidden_size": "48"')
        ),
        "hidden_size",
    ),
    "data that makes no sense": (
        lambda f: (f / "navil_config.json").write_text(
            (f / "navil_config.json").read_text().replace('"data": {}', '"data": {"min_image_pixels": "x"}')
        ),
        "navil_config.json",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_CHECKPOINTS)
def test_damaged_checkpoint(
    fault: str, damaged: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BROKEN_CHECKPOINTS[fault]
    damage(damaged["to-hf"])
    line = refused(capsys, "to-hf", damaged["to-hf"], tmp_path / "target")
    assert message in line
    assert len(line) < 1500
    assert not (tmp_path / "exploded").exists()


def test_a_legacy_common_state_is_not_opened(damaged: dict[str, Path], tmp_path: Path) -> None:
    """What core would unpickle has nothing that a conversion needs."""
    (damaged["to-hf"] / "common.pt").write_bytes(pickle.dumps(_Bomb(tmp_path / "exploded")))

    def replace(metadata: Any) -> None:
        bomb = damaged["to-hf"] / "__0_8.distcp"
        bomb.write_bytes(pickle.dumps(_Bomb(tmp_path / "exploded")))
        place = _place(metadata, "common_state/shard_0_1")
        place.relative_path, place.offset, place.length = bomb.name, 0, bomb.stat().st_size

    _metadata(damaged["to-hf"], replace)
    convert_to_hf(damaged["to-hf"], tmp_path / "target")
    assert not (tmp_path / "exploded").exists()


def test_a_save_that_was_not_finished_is_not_taken(sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sources["to-hf"], tmp_path / "step_00000003.partial")
    assert "holds no checkpoint" in str(_error(lambda: convert_to_hf(tmp_path, tmp_path / "target")))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_checkpoint_that_is_deleted_while_it_is_read_is_not_called_damaged(
    jobs: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    newest = tmp_path / "run" / "step_00000002"
    shutil.copytree(sources["to-hf"], newest)

    def rotate(done: int, total: int) -> None:
        if newest.exists():  # as CheckpointManager does with those beyond keep_last
            shutil.rmtree(newest.rename(f"{newest}.partial"))

    run = {"num_processes": jobs, "on_progress": rotate}
    message = str(_error(lambda: convert_to_hf(tmp_path / "run", tmp_path / "target", **run)))
    assert message.startswith(f"checkpoint {newest} was deleted while it was read")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_files_in_hugging_faces_cache_are_links_and_read(sources: dict[str, Path], tmp_path: Path) -> None:
    """The cache keeps files in ``blobs`` and links to them from ``snapshots``."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "a1"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(sources["from-hf"].iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    convert_from_hf(snapshot, tmp_path / "target")
    assert compare_weights(sources["from-hf"], tmp_path / "target")["equal"]


def test_damaged_checksums(damaged: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("{", "[]", '{"algorithm": "md5", "tensors": {}}', '{"algorithm": "xxh3_128", "tensors": {"a": 1}}'):
        (damaged["from-hf"] / CHECKSUMS_FILE).write_text(content)
        assert "checksums.json is damaged" in refused(capsys, "from-hf", damaged["from-hf"], tmp_path / "target")
    (damaged["from-hf"] / CHECKSUMS_FILE).write_text('{"algorithm": "xxh3_128", "tensors": {}}')
    assert "has no hash of" in refused(capsys, "from-hf", damaged["from-hf"], tmp_path / "target")
