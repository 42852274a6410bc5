"""Copies on the nodes' own disks: bit for bit what a checkpoint restores, and from another where one is lost."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import ChainedOptimizer

from navil_megatron.checkpoint.local_copies import LocalCopies
from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.checkpoint.rank_state import held_tensors, restore_rank_state
from navil_megatron.config.errors import BadNumbers
from navil_megatron.config.run import NaViLConfig
from navil_megatron.models.build import build_model
from navil_megatron.runtime.session import Session
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step
from tests.distributed.test_damaged_checkpoint import warnings
from tests.distributed.test_layouts import BATCH, LAYOUTS
from tests.distributed.tiny_training import Run
from tests.oracle import global_batch, merge_sections, oracle_config
from tests.ranks import run_ranks, start_session, tiny_config

Held = list[tuple[str, torch.Tensor]]


def _nodes_of_one_rank(config: NaViLConfig, session: Session, folder: Path) -> NaViLConfig:
    """The same run, with each rank on a node of its own."""
    session.local_world_size = 1
    place = {"local_directory": str(folder / f"node{session.rank}"), "local_every_steps": 2}
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, **place))


def _held(chunks: Sequence[torch.nn.Module], optimizer: ChainedOptimizer) -> Held:
    return [(name, tensor.detach().clone()) for name, tensor in held_tensors(chunks, optimizer)]


def _assert_same(one: Held, other: Held) -> None:
    assert [name for name, _ in one] == [name for name, _ in other]
    assert [name for (name, a), (_, b) in zip(one, other, strict=True) if not torch.equal(a, b)] == []


class Training:
    """A run of the real model, from its first weights."""

    def __init__(self, config: NaViLConfig, session: Session) -> None:
        self.config, self.session = config, session
        self.model = build_model(config, session.groups, session.device)
        self.chunks = wrap_ddp(config, session, self.model)
        self.optimizer = build_optimizer(config, self.chunks, session)

    def step(self) -> None:
        batch = global_batch(self.config, BATCH, self.session)
        share, replica = len(batch) // self.session.groups.dp.size(), self.session.groups.dp.rank()
        mine = batch[replica * share : (replica + 1) * share]
        train_step(self.config, self.session, self.chunks, self.optimizer, mine, lr=1e-2)

    def held(self) -> Held:
        return [*_held(self.model, self.optimizer), ("generator", torch.get_rng_state())]


def _both_ways(rank: int, world_size: int, sections: dict[str, Any], folder: Path) -> None:
    """The same step from a checkpoint, and from a copy after its node is lost; then one more step."""
    config = oracle_config(**merge_sections(sections, {"checkpoint": {"directory": str(folder / "checkpoints")}}))
    with start_session(rank, world_size, config) as session:
        config = _nodes_of_one_rank(config, session, folder)
        straight, copies = Training(config, session), LocalCopies(config, session)
        straight.step()
        straight.step()
        torch.rand(rank + 1)
        copies.save(2, straight.model, straight.optimizer, {"step": 2})
        manager = CheckpointManager(config, session)
        checkpoint = manager.save(2, straight.model, straight.optimizer, {"step": 2})
        then = straight.held()
        straight.step()  # while the copy is being written
        copies.settle()
        if rank == 1:
            shutil.rmtree(folder / "node1")
        torch.distributed.barrier()

        torch.manual_seed(7)
        by_copy, by_checkpoint = Training(config, session), Training(config, session)
        found = LocalCopies(config, session).find(None)
        assert found is not None and found["training"] == {"step": 2}
        restore_rank_state(found, by_copy.model, by_copy.optimizer)
        _assert_same(by_copy.held(), then)
        torch.manual_seed(7)
        assert manager.restore(checkpoint, by_checkpoint.model, by_checkpoint.optimizer) == {"step": 2}
        _assert_same(by_checkpoint.held(), then)
        by_copy.step()
        by_checkpoint.step()
        _assert_same(by_copy.held()[:-1], straight.held()[:-1])
        _assert_same(by_checkpoint.held()[:-1], straight.held()[:-1])


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2-distributed-optimizer"])
def test_a_copy_restores_what_a_checkpoint_does(layout: str, tmp_path: Path) -> None:
    """Weights, FP32 copies, moments, generators, and the next step; one of two nodes has lost its disk."""
    world_size, sections = LAYOUTS[layout]
    run_ranks(world_size, _both_ways, merge_sections(sections, {"precision": {"type": "bf16"}}), tmp_path)


class Copied:
    """A tiny run on two nodes with copies of steps 2 and 4, the newer of which is being written."""

    def __init__(self, config: NaViLConfig, session: Session) -> None:
        self.config, self.session, self.run = config, session, Run(config, session)
        self.copies = LocalCopies(config, session)
        self.node = Path(str(config.checkpoint.local_directory))
        for step in (2, 4):
            self.save(step)

    def save(self, step: int) -> None:
        self.run.step(step)
        self.copies.save(step, self.run.chunks, self.run.optimizer, {"step": step})

    def found(self, checkpoint: int = 0, **changed: Any) -> int | None:
        """Step of the copy that a new start would take, which is the same on every rank."""
        torch.distributed.barrier()
        config = dataclasses.replace(self.config, **changed)
        checkpoints = Path(self.config.checkpoint.directory)
        state = LocalCopies(config, self.session).find(checkpoints / f"step_{checkpoint:08d}" if checkpoint else None)
        steps: list[int | None] = [None] * self.session.world_size
        torch.distributed.all_gather_object(steps, state and state["training"]["step"])
        assert len(set(steps)) == 1
        return steps[0]

    def part(self, step: int, rank: int) -> Path:
        """On this node."""
        (path,) = self.node.glob(f"*/step_{step:08d}.*/rank_{rank:05d}")
        return path

    def names(self) -> list[str]:
        return sorted(path.name.partition(".")[0] for path in self.node.glob("*/*"))


def _taken_or_not(rank: int, world_size: int, sections: dict[str, Any], folder: Path) -> None:
    with start_session(rank, world_size, tiny_config(**sections)) as session:
        config = _nodes_of_one_rank(tiny_config(**sections), session, folder)
        copied = Copied(config, session)
        copied.copies.settle()
        assert copied.names() == ["step_00000002", "step_00000004"]
        assert copied.found() == 4
        assert copied.found(checkpoint=3) == 4
        assert copied.found(checkpoint=4) is None
        assert copied.found(optimizer=dataclasses.replace(config.optimizer, lr=1.0)) is None

        (folder / "checkpoints" / "step_00000005").mkdir(exist_ok=True)
        torch.distributed.barrier()
        copied.save(6)
        copied.copies.settle()
        assert copied.names() == ["step_00000004", "step_00000006"]
        assert copied.found(checkpoint=5) == 6
        assert copied.found(checkpoint=4) is None  # 5 was taken away: 6 came after it, and 4 is no newer
        assert copied.found(checkpoint=3) == 4
        run_file = folder / "checkpoints" / "run_id"
        name = run_file.read_text()
        torch.distributed.barrier()
        if rank == 0:
            run_file.unlink()
        assert copied.found(checkpoint=5) is None  # of another run
        torch.distributed.barrier()
        if rank == 0:
            run_file.write_text(name)
        assert copied.found(checkpoint=5) == 6
        copied.copies.close()
        assert copied.names() == []


def _damaged(rank: int, world_size: int, sections: dict[str, Any], folder: Path) -> None:
    with start_session(rank, world_size, tiny_config(**sections)) as session:
        copied = Copied(_nodes_of_one_rank(tiny_config(**sections), session, folder), session)
        copied.copies.settle()
        if rank == 0:
            _flip(copied.part(4, 0))
        with warnings() as said:
            assert copied.found() == 4  # rank 0 has it from node 1
        assert len(said) == (rank == 0) and all("has a damaged" in line for line in said), said
        assert not list(copied.node.glob("*/step_00000004.*/rank_00000")) or rank == 1
        if rank == 1:
            # A part that names a function; it would make a folder.
            torch.save(_Calls(folder / "executed"), copied.part(4, 0))
        with warnings() as said:
            assert copied.found() == 2
        assert len(said) == (rank == 1) and all("os.mkdir" in line or "posix.mkdir" in line for line in said), said
        assert not (folder / "executed").exists()
        if rank == 1:
            copied.part(2, 1).write_bytes(copied.part(2, 0).read_bytes())  # whole, and another rank's
        with warnings() as said:
            assert copied.found() == 2
        assert len(said) == (rank == 1), said


class _Calls:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        import os

        return os.mkdir, (str(self.path),)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _not_written(rank: int, world_size: int, sections: dict[str, Any], folder: Path) -> None:
    with start_session(rank, world_size, tiny_config(**sections)) as session:
        copied = Copied(_nodes_of_one_rank(tiny_config(**sections), session, folder), session)
        copied.copies.settle()
        (run,) = copied.node.iterdir()
        if rank == 1:
            run.rename(run.with_name("away"))
            run.write_text("no folder")
        torch.distributed.barrier()
        with warnings() as said:
            copied.save(6)
            copied.copies.settle()
        assert len(said) == (rank == 0) and all("on the node of rank 1 (NotADirectoryError" in line for line in said)
        if rank == 1:
            run.unlink()
            run.with_name("away").rename(run)
        assert copied.found() == 6  # node 0 has both parts
        copied.save(8)  # what is whole on every node stays until the next one is
        torch.distributed.barrier()
        copied.copies.settle()
        assert copied.names() == ["step_00000004", "step_00000008"]
        assert copied.found() == 8
        if rank == 1:
            next(iter(copied.run.chunks[0].parameters())).data.view(-1)[0] = float("nan")
        with pytest.raises(BadNumbers if rank == 0 else SystemExit):
            copied.copies.save(10, copied.run.chunks, copied.run.optimizer, {})
        assert copied.found() == 8


@pytest.mark.parametrize("case", [_taken_or_not, _damaged, _not_written])
def test_only_what_is_whole_and_of_this_run_is_taken(case: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    run_ranks(2, case, {"checkpoint": {"directory": str(tmp_path / "checkpoints")}}, tmp_path)
