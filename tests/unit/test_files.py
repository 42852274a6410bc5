"""What everybody writes and reads files with: whole or absent, in the shape that others expect."""

import os
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from torch.distributed.checkpoint import filesystem

from navil_megatron.config.errors import UserError
from navil_megatron.files.atomic_file import new_file, partial_of
from navil_megatron.files.atomic_folder import new_folder
from navil_megatron.files.checkpoint_folder import (
    FORMAT_FILE,
    METADATA_FILE,
    complete_checkpoints,
    find_checkpoint,
    is_checkpoint,
    read_config,
    step_folder,
    step_of,
    write_config,
)
from navil_megatron.files.disk_space import free_bytes
from navil_megatron.files.json_file import read_json
from navil_megatron.files.worker_pool import Meter, Tell, run_shares


def _die_as_it_writes(path: str) -> None:
    with new_file(Path(path)) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "x.index"
    with new_file(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), new_file(path) as file:
        file.write(b"broken")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
    process = get_context("forkserver").Process(target=_die_as_it_writes, args=(str(path),))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert path.read_bytes() == b"old" and partial_of(path).read_bytes() == b"half"
    with new_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and [*tmp_path.iterdir()] == [path]


def test_a_folder_that_was_made_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "out") as partial:
        (partial / "mine").write_text("mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_a_checkpoint_has_the_names_that_torch_and_core_give() -> None:
    assert filesystem._metadata_fn == METADATA_FILE and FORMAT_FILE == CONFIG_FNAME


def test_the_newest_complete_checkpoint_of_a_run(tmp_path: Path) -> None:
    assert not is_checkpoint(tmp_path) and complete_checkpoints(tmp_path / "absent") == []
    partial_of(step_folder(tmp_path, 30)).mkdir()
    (tmp_path / "step_new").mkdir()
    with pytest.raises(UserError, match=r"holds no checkpoint: expected navil_config.json .*; look elsewhere"):
        find_checkpoint(tmp_path, "look elsewhere")
    for step in (9, 20, 100):
        step_folder(tmp_path, step).mkdir()
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [9, 20, 100]
    assert find_checkpoint(tmp_path) == step_folder(tmp_path, 100) == find_checkpoint(step_folder(tmp_path, 100).parent)
    assert is_checkpoint(tmp_path) and step_of(tmp_path / "step_new") is None and step_of(Path("100")) is None


def test_a_config_that_is_written_can_be_read_whatever_the_paths_in_it(tmp_path: Path) -> None:
    config = {"model": {"layers": 2}, "data": {"tokenizer": os.fsdecode(b"/caf\xe9/\xc3\xa9")}}
    write_config(tmp_path, config)
    assert read_config(tmp_path) == config
    write_config(tmp_path, {"model": {}, "data": [1]})
    with pytest.raises(UserError, match="has a data section that is no table"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [None, b"{", b"\xff{}", b"[1]", b"[" * 100_000])
def test_json_that_is_no_object_is_one_line_that_names_the_file(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json .*: save it anew") as error:
        read_json(path, "save it anew")
    assert "\n" not in str(error.value)


def test_free_space_is_that_of_the_disk_under_a_folder_to_come(tmp_path: Path, small_disk: object) -> None:
    disk = small_disk("size=1m")  # type: ignore[operator]
    assert free_bytes(disk / "not" / "yet") == free_bytes(disk) <= 1 << 20 < free_bytes(tmp_path)


def prepare() -> None:
    os.environ["PREPARED"] = "yes"


def square(number: int, share: int, tell: Tell) -> tuple[int, int, str]:
    if share < 0:
        raise UserError(f"{share} is negative")
    tell(share)
    return number, share * share, os.environ.get("PREPARED", "no")


@pytest.mark.parametrize("jobs", [1, 3])
def test_shares_give_results_in_order_and_tell_of_all(jobs: int) -> None:
    told: list[tuple[int, int]] = []
    shares = list(range(40))
    results = run_shares(square, shares, jobs, Meter(sum(shares), lambda *done: told.append(done)), prepare)
    assert results == [(n, n * n, "no" if jobs == 1 else "yes") for n in shares]
    assert told[-1] == (sum(shares), sum(shares)) and len(told) == len(shares)
    with pytest.raises(UserError, match="-5 is negative"):
        run_shares(square, [*shares, -5], jobs, Meter(1, None), prepare)
