"""Saves beside the training: the bytes of the step that asked for them; told where they fail; one after the other."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint import FileSystemReader

from navil_megatron.checkpoint.background_call import BackgroundCall
from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.models.build import build_model
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step
from tests.distributed.test_layouts import BATCH, LAYOUTS
from tests.distributed.tiny_training import Run, manager_of
from tests.oracle import global_batch, merge_sections, oracle_config
from tests.ranks import RankFailure, run_ranks, start_session, tiny_config

PLACES = {name: LAYOUTS[name] for name in ("tp2", "pp2", "dp2-distributed-optimizer")} | {"one-rank": (1, {})}


class Gate:
    """Holds the writers of this process's forks until it is opened; then each does what it would have done."""

    def __init__(self) -> None:
        self._closed, self._opened = os.pipe()
        original = FileSystemWriterAsync.write_preloaded_data

        def write(*args: Any, **kwargs: Any) -> Any:
            os.read(self._closed, 1)
            return original(*args, **kwargs)

        FileSystemWriterAsync.write_preloaded_data = write

    def open(self) -> None:
        os.write(self._opened, b"0")


def _both_ways(rank: int, world_size: int, sections: dict[str, Any], folder: Path) -> None:
    """The same step saved while training waits, and while it goes on."""
    config = oracle_config(
        **merge_sections(sections, {"checkpoint": {"directory": str(folder / "waited"), "async_save": True}})
    )
    with start_session(rank, world_size, config) as session:
        model = build_model(config, session.groups, session.device)
        chunks = wrap_ddp(config, session, model)
        optimizer = build_optimizer(config, chunks, session)
        batch = global_batch(config, BATCH, session)
        share = len(batch) // session.groups.dp.size()
        mine = batch[session.groups.dp.rank() * share : (session.groups.dp.rank() + 1) * share]
        train_step(config, session, chunks, optimizer, mine, lr=1e-2)
        manager = CheckpointManager(config, session)
        manager.save(1, model, optimizer, {"step": 1})
        gate, manager.directory = Gate(), folder / "went_on"
        manager.save(1, model, optimizer, {"step": 1}, wait=False)
        train_step(config, session, chunks, optimizer, mine, lr=1e-2)
        manager.settle()
        assert manager.latest() is None
        gate.open()
        manager.settle(wait=True)
        gate.open()
        manager.save(2, model, optimizer, {"step": 2})


@pytest.mark.parametrize("layout", PLACES)
def test_what_is_written_is_the_step_that_asked(layout: str, tmp_path: Path) -> None:
    """Byte for byte, checksums included, although the next step is done before the first byte is written."""
    world_size, sections = PLACES[layout]
    sections = merge_sections(sections, {"precision": {"type": "bf16"}})
    run_ranks(world_size, _both_ways, sections, tmp_path)
    waited, went_on, next_step = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("waited/step_00000001", "went_on/step_00000001", "went_on/step_00000002")
    )
    first, second = (
        FileSystemReader(tmp_path / name / "step_00000001").read_metadata() for name in ("waited", "went_on")
    )
    assert second.state_dict_metadata == first.state_dict_metadata and second.storage_data == first.storage_data
    for files in (waited, went_on, next_step):
        del files["navil_config.json"], files[".metadata"]  # they name the folder
    assert sum(name.endswith(".distcp") for name in waited) == world_size
    assert went_on.keys() == waited.keys() == next_step.keys()
    assert [name for name in waited if went_on[name] != waited[name]] == []
    assert next_step["__0_0.distcp"] != waited["__0_0.distcp"]  # or nothing would be shown


@contextmanager
def _told(heard: Callable[[str], None]) -> Iterator[None]:
    """Calls for every warning of the package."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("navil_megatron").addHandler(handler)
    yield
    logging.getLogger("navil_megatron").removeHandler(handler)


def _fails(rank: int, world_size: int, sections: dict[str, Any], failure: str) -> tuple[list[str], list[list[str]]]:
    """Three saves, the second of which fails on rank 1; gives the warnings, and what lay there after each."""
    config, told, there = tiny_config(**sections), list[str](), list[list[str]]()
    original = FileSystemWriterAsync.write_preloaded_data, os.fork
    with start_session(rank, world_size, config) as session, _told(told.append):
        run, manager = Run(config, session), manager_of(config, session)
        for step in (1, 2, 3):
            run.step(step)
            FileSystemWriterAsync.write_preloaded_data, os.fork = original
            if step == 2 and rank == 1:
                _break(failure)
            manager.save(step, run.chunks, run.optimizer, {"step": step}, wait=False)
            manager.settle(wait=True)
            there.append(sorted(path.name for path in manager.directory.iterdir()))
            torch.distributed.barrier()
    return told, there


def _break(failure: str) -> None:
    def no_fork() -> int:
        raise OSError(12, "Cannot allocate memory")

    def killed(*_: Any, write_bucket: Any, **__: Any) -> Any:
        Path(write_bucket[0]).write_bytes(b"the first half")
        os.kill(os.getpid(), signal.SIGKILL)

    def full(*_: Any, write_bucket: Any, **__: Any) -> Any:
        return 0, OSError(28, "No space left on device", write_bucket[0])

    if failure == "Cannot allocate memory":
        os.fork = no_fork
    else:
        FileSystemWriterAsync.write_preloaded_data = killed if "killed" in failure else full


@pytest.mark.parametrize("failure", ["No space left on device", "was killed", "Cannot allocate memory"])
def test_a_save_that_fails_is_told_and_costs_nothing_else(failure: str, tmp_path: Path) -> None:
    sections = {"checkpoint": {"directory": str(tmp_path), "async_save": True, "keep_last": 1}}
    (told, there), (others, _) = run_ranks(2, _fails, sections, failure)
    assert there == [["step_00000001"], ["step_00000001"], ["step_00000003"]]
    assert others == []
    (line,) = told
    assert line.startswith(f"cannot write checkpoint {tmp_path}/step_00000002 (") and failure in line
    assert line.endswith(f"training goes on, and the next save is another try; until then a start would go on from "
                         f"{tmp_path}/step_00000001")  # fmt: skip


def _one_after_the_other(rank: int, world_size: int, sections: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Each save comes due while the one before it is being written, which is let go on once the wait is told."""
    config, told, there = tiny_config(**sections), list[str](), list[list[str]]()
    gate = Gate()

    def hear(line: str) -> None:
        told.append(line)
        there.append(sorted(path.name for path in Path(config.checkpoint.directory).iterdir()))
        gate.open()
        gate.open()
        gate.open()

    with start_session(rank, world_size, config) as session, _told(hear):
        run, manager = Run(config, session), manager_of(config, session)
        for step in (1, 2, 3):
            run.step(step)
            manager.save(step, run.chunks, run.optimizer, {"step": step}, wait=step == 3)
            there.append(sorted(path.name for path in manager.directory.iterdir()))
    return told, there


def test_a_save_waits_for_the_one_before_it(tmp_path: Path) -> None:
    """Nothing is deleted before the newer one is whole, and the last one is there when the run ends."""
    sections = {"checkpoint": {"directory": str(tmp_path), "async_save": True, "keep_last": 1}}
    ((told, there),) = run_ranks(1, _one_after_the_other, sections)
    (line,) = told
    assert line.startswith("the save of step 2 waits for step_00000001, which is still being written")
    assert there == [
        ["step_00000001.partial"],
        ["step_00000001.partial"],
        ["step_00000001", "step_00000002.partial"],
        ["step_00000003"],
    ]


def _killed_while_it_writes(rank: int, world_size: int, marker: Path) -> None:
    blocked, _ = os.pipe()
    call = BackgroundCall(lambda: (marker.write_text(str(os.getpid())), os.read(blocked, 1)))
    while not (marker.exists() and marker.read_text()):
        assert not call.is_done()
    os.kill(os.getpid(), signal.SIGKILL)


def test_who_writes_ends_with_its_rank(tmp_path: Path) -> None:
    """Or it would write into the folder that the next run makes under the same name."""
    with pytest.raises(RankFailure, match="the process died"):
        run_ranks(1, _killed_while_it_writes, tmp_path / "writer")
    writer = int((tmp_path / "writer").read_text())
    deadline = time.monotonic() + 60
    while psutil.pid_exists(writer) and psutil.Process(writer).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
