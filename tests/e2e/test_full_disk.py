"""A disk that fills up costs the steps since the newest checkpoint and one line, nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.checkpoint.sharded import saved_bytes
from navil_megatron.config.errors import EXIT_CODE, UserError, describe
from navil_megatron.config.run import NaViLConfig
from navil_megatron.models.build import build_model
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from tests.e2e.runs import (
    World,
    error_lines,
    make_run,
    pretrain_in_rank,
    records,
    saved_steps,
    train_in_rank,
    write_toml,
)
from tests.ranks import run_ranks, start_session, tiny_config

Disk = Callable[[str], Path]
LAYOUTS = {
    "one": (1, {}),
    "tensor": (2, {"parallel": {"tp": 2}}),
    "data": (2, {}),
    "tensor and pipeline": (4, {"parallel": {"tp": 2, "pp": 2}}),
    "expert": (2, {"parallel": {"ep": 2}}),
}
"""Ranks, and sections of the config."""


def _saved_and_planned(rank: int, world_size: int, config: NaViLConfig) -> tuple[int, int]:
    """Bytes of the tensors that a checkpoint holds, and of those that were announced."""
    with start_session(rank, world_size, config) as session:
        model = build_model(config, session.groups, session.device)
        chunks = wrap_ddp(config, session, model)
        planned = saved_bytes(config)
        folder = CheckpointManager(config, session).save(0, model, build_optimizer(config, chunks, session), {})
        entries = FileSystemReader(folder).read_metadata().state_dict_metadata.values()
    tensors = [entry for entry in entries if isinstance(entry, TensorStorageMetadata)]
    return sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in tensors), planned


@pytest.mark.parametrize("phase", ["s1.1", "s2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_announced_size_is_the_size(layout: str, precision: str, phase: str, tmp_path: Path) -> None:
    world_size, sections = LAYOUTS[layout]
    changed = {"training": {"phase": phase}, "precision": {"type": precision}}
    config = tiny_config(**sections, **changed, checkpoint={"directory": str(tmp_path)})
    for saved, planned in run_ranks(world_size, _saved_and_planned, config):
        assert saved == planned


def _train(rank: int, world_size: int, config: NaViLConfig) -> str:
    """Trains to the end; gives the problem that rank 0 raises. The others leave without a word."""
    try:
        train_in_rank(rank, world_size, config)
    except UserError as error:
        return describe(error)
    except SystemExit as left:
        return f"exit {left.code}"
    return ""


def _problem(config: NaViLConfig) -> str:
    """What two ranks say that stop for one and the same reason."""
    line, other = run_ranks(2, _train, config)
    assert other == f"exit {EXIT_CODE}" and len(line.splitlines()) == 1
    return line


def test_a_disk_that_fills_up(world: World, tmp_path: Path, small_disk: Disk) -> None:
    """Refused before the first step; ended by the save that does not fit; resumed to the same weights as ever."""
    disk = small_disk("size=64k")
    config = make_run(
        world, tmp_path, training={"train_steps": 4}, checkpoint={"directory": str(disk / "run"), "save_every_steps": 2}
    )
    message = _problem(config)
    assert "MB free" in message and "MB are needed" in message
    assert records(config, "train") == [] and saved_steps(config) == []

    whole = make_run(world, tmp_path / "whole", training={"train_steps": 4})
    assert run_ranks(2, _train, whole) == ["", ""]
    size = sum(path.stat().st_size for path in Path(whole.checkpoint.directory).rglob("*") if path.is_file())

    small_disk(f"remount,size={int(1.5 * size)}")
    message = _problem(config)
    assert "cannot write checkpoint" in message and "step_00000004" in message and "MB free" in message
    assert message.endswith(f"the run goes on from {disk / 'run' / 'step_00000002'}")
    assert saved_steps(config) == ["step_00000002"]

    small_disk(f"remount,size={4 * size}")
    assert run_ranks(2, _train, config) == ["", ""]
    assert records(config, "train")[-1]["loss"] == records(whole, "train")[-1]["loss"]
    assert saved_steps(config) == ["step_00000002", "step_00000004"]


def test_logs_on_a_full_disk(world: World, tmp_path: Path, small_disk: Disk) -> None:
    disk = small_disk("size=64k")
    (disk / "full").write_bytes(b"0" * (60 << 10))
    config = make_run(world, tmp_path, training={"train_steps": 40}, logging={"directory": str(disk / "logs")})
    ((code, stderr),) = run_ranks(1, pretrain_in_rank, write_toml(config, tmp_path / "run.toml"))
    (line,) = error_lines(stderr)
    assert code == EXIT_CODE and "No space left on device" in line
