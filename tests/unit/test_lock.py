"""One owner at a time: real processes that are killed, stopped and raced, and owners on another machine."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from navil_megatron.config.errors import UserError
from navil_megatron.files import lock as lock_module
from navil_megatron.files.lock import owned

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def _own(path: Path, held: Any, leave: Any) -> None:
    lock_module.BEAT_SECONDS = 0.02
    with owned(path, "the run"):
        held.set()
        leave.wait(60)


def start_owner(path: Path) -> Any:
    """A process that owns a lock until it is killed."""
    held, leave = CONTEXT.Event(), CONTEXT.Event()
    process = CONTEXT.Process(target=_own, args=(path, held, leave), daemon=True)
    process.start()
    assert held.wait(60)
    return process


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BEAT_SECONDS": 0.02, "STALE_SECONDS": 0.5, "_LOOK_SECONDS": 0.01}.items():
        monkeypatch.setattr(lock_module, name, seconds)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """This process is on another machine than those that it starts."""
    monkeypatch.setattr(lock_module, "_namespace", lambda: "another boot")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_second_owner_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    path = tmp_path / "run" / ".lock"
    with owned(path, "the run"):
        with pytest.raises(UserError) as refused, owned(path, "the run", "wait"):
            pass
        expected = (
            rf"the run is being written by another process; wait \(process {os.getpid()} on .* since .*; .*\.lock\)"
        )
        assert refused.match(expected) and "\n" not in str(refused.value)
        (owner,) = path.iterdir()
        assert names(tmp_path) == [".lock", owner.name, "run"]
    assert names(tmp_path) == ["run"]
    with owned(path, "the run"):
        pass


def is_running(pid: int) -> bool:
    """Whether a process is there and not dead, be it that its exit status was not asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_owner_here_is_replaced_at_once_and_a_stopped_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process = start_owner(path)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match=f"process {process.pid} on "), owned(path, "the run"):
        pass
    process.kill()
    while is_running(process.pid):
        time.sleep(0.001)
    with owned(path, "the run"):
        assert len(names(tmp_path)) == 2
    process.join()


def test_a_process_that_got_the_number_of_a_dead_owner_does_not_own(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with owned(path, "the run"):
        (file,) = path.iterdir()
        fields = json.loads(file.read_bytes())
        file.write_text(json.dumps(fields | {"pid": os.getppid(), "started": fields["started"] - 10_000_000}))
        with owned(path, "the run"):
            pass


def test_an_owner_on_another_machine_counts_by_what_it_does(tmp_path: Path, far: None) -> None:
    """It beats: refused. It stands still: replaced, whatever its clock says; and when it wakes up it ends."""
    path = tmp_path / ".lock"
    process = start_owner(path)
    with pytest.raises(UserError, match=f"process {process.pid} on "), owned(path, "the run"):
        pass
    os.kill(process.pid, signal.SIGSTOP)
    (file,) = path.iterdir()
    os.utime(file, (4_000_000_000, 4_000_000_000))  # by a clock that is decades ahead
    begun = time.monotonic()
    with owned(path, "the run"):
        assert time.monotonic() - begun >= lock_module.STALE_SECONDS
        os.kill(process.pid, signal.SIGCONT)
        process.join(30)
        assert process.exitcode == 1
        (mine,) = path.iterdir()
        assert mine.name != file.name


def test_a_lock_that_a_crash_cut_short_is_replaced(tmp_path: Path, quick: None) -> None:
    path = tmp_path / ".lock"
    path.mkdir()
    (path / "token").write_bytes(b'{"pid": 7, "sta')
    with owned(path, "the run"):
        assert len(names(tmp_path)) == 2
    path.mkdir()  # a taker died between its two steps
    with owned(path, "the run"):
        pass


def _race(folder: Path, rounds: int, barrier: Any, results: Any) -> None:
    for number in range(rounds):
        barrier.wait(60)
        try:
            with owned(folder / str(number), "the run"):
                results.put((number, "won"))
                barrier.wait(60)
        except UserError as error:
            results.put((number, str(error)))
            barrier.wait(60)


def test_of_many_takers_of_a_dead_owner_one_wins(tmp_path: Path) -> None:
    takers, rounds = 4, 20
    dead = start_owner(tmp_path / "dead")
    dead.kill()
    dead.join()
    for number in range(rounds):
        shutil.copytree(tmp_path / "dead", tmp_path / "locks" / str(number))
    barrier, results = CONTEXT.Barrier(takers), CONTEXT.Queue()
    arguments = (tmp_path / "locks", rounds, barrier, results)
    processes = [CONTEXT.Process(target=_race, args=arguments, daemon=True) for _ in range(takers)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in range(takers * rounds)]
    for process in processes:
        process.join()
    assert sorted(number for number, result in found if result == "won") == list(range(rounds))
    assert all("another process" in result for _, result in found if result != "won")
    assert names(tmp_path / "locks") == []
