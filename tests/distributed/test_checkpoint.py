"""Checkpoints: whole or absent, restored bit for bit, at any layout, and never into another model."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import queue
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from navil_megatron.checkpoint.compatibility import require_same_model, require_same_optimizer
from navil_megatron.config.errors import UserError
from navil_megatron.training.state import TrainingState
from tests.distributed.tiny_training import Run, manager_of
from tests.ranks import RankFailure, run_ranks, start_session, tiny_config
from tests.whole import read_whole

Sections = dict[str, Any]


def _sections(folder: Path, **changed: Any) -> Sections:
    return {"checkpoint": {"directory": str(folder)}, **changed}


def _train(rank: int, world_size: int, sections: Sections, steps: list[int], save_at: tuple[int, ...]) -> Any:
    """Restores what there is, trains on ``steps``, saves at some; gives weights, moments and the training state."""
    config = tiny_config(**sections)
    with start_session(rank, world_size, config) as session:
        run = Run(config, session)
        manager = manager_of(config, session)
        restored = manager.restore_latest(run.chunks, run.optimizer)
        for step in steps:
            run.step(step)
            if step in save_at:
                state = TrainingState(step=step, consumed_samples=4 * step, loader={"epoch": 1})
                manager.save(step, run.chunks, run.optimizer, state.to_dict())
        return run.weights(), _moments(run), restored


def _moments(run: Run) -> list[tuple[torch.Tensor, ...]]:
    """Master weight and both moments of everything this rank updates, and the step count."""
    inner = run.optimizer.chained_optimizers[0].optimizer
    return [
        (
            weight.detach().clone(),
            inner.state[weight]["exp_avg"].clone(),
            inner.state[weight]["exp_avg_sq"].clone(),
            torch.tensor(group["step"]),
        )
        for group in inner.param_groups
        for weight in group["params"]
    ]


LAYOUTS = {
    "one": (1, {}),
    "tensor": (2, {"parallel": {"tp": 2}}),
    "data": (2, {}),
    "tensor and data": (4, {"parallel": {"tp": 2}}),
}


def _straight_and_resumed(rank: int, world_size: int, sections: Sections, saved_after: int = 2) -> None:
    """Four steps straight; then some, a save, and the others with a new model and optimizer."""
    config = tiny_config(**sections)
    with start_session(rank, world_size, config) as session:
        straight, stopped = Run(config, session), Run(config, session)
        manager = manager_of(config, session)
        state = TrainingState(step=saved_after).to_dict()
        for step in range(1, saved_after + 1):
            straight.step(step)
            stopped.step(step)
        manager.save(saved_after, stopped.chunks, stopped.optimizer, state)
        resumed = Run(config, session)
        assert manager.restore_latest(resumed.chunks, resumed.optimizer) == state
        for step in range(saved_after + 1, 5):
            straight.step(step)
            resumed.step(step)
        torch.testing.assert_close(resumed.weights(), straight.weights(), rtol=0, atol=0)
        torch.testing.assert_close(_moments(resumed), _moments(straight), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("layout", ["tensor", "data"])
def test_save_and_restore_equals_going_straight(layout: str, distributed: bool, precision: str, tmp_path: Path) -> None:
    world_size, changed = LAYOUTS[layout]
    changed = {**changed, "optimizer": {"distributed": distributed}, "precision": {"type": precision}}
    run_ranks(world_size, _straight_and_resumed, _sections(tmp_path, **changed))


@pytest.mark.parametrize("distributed", [True, False])
def test_a_save_before_the_first_step_is_restored(distributed: bool, tmp_path: Path) -> None:
    """Core cannot save an optimizer that has no moments yet."""
    run_ranks(2, _straight_and_resumed, _sections(tmp_path, optimizer={"distributed": distributed}), 0)


def test_a_new_process_resumes_bit_for_bit(tmp_path: Path) -> None:
    changed = {"parallel": {"tp": 2}}
    straight = run_ranks(2, _train, _sections(tmp_path / "straight", **changed), [1, 2, 3, 4], ())
    stopped = _sections(tmp_path / "stopped", **changed)
    run_ranks(2, _train, stopped, [1, 2], (2,))
    resumed = run_ranks(2, _train, stopped, [3, 4], ())
    for (weights, moments, _), (weights_again, moments_again, restored) in zip(straight, resumed, strict=True):
        assert TrainingState.from_dict(restored) == TrainingState(step=2, consumed_samples=8, loader={"epoch": 1})
        torch.testing.assert_close(weights_again, weights, rtol=0, atol=0)
        torch.testing.assert_close(moments_again, moments, rtol=0, atol=0)


@pytest.mark.parametrize("distributed", [True, False])
def test_every_layout_reads_and_writes_the_same_tensors(distributed: bool, tmp_path: Path) -> None:
    """A checkpoint handed from layout to layout stays the same, tensor by tensor, moments included."""
    sections = _sections(tmp_path, optimizer={"distributed": distributed})
    sections["checkpoint"]["keep_last"] = 10
    run_ranks(1, _train, sections, [1, 2], (2,))
    before = read_whole(tmp_path / "step_00000002")
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in before)
    for step, layout in enumerate(("tensor", "data", "tensor and data", "one"), start=3):
        world_size, changed = LAYOUTS[layout]
        run_ranks(world_size, _resave, {**sections, **changed}, step)
        after = read_whole(tmp_path / f"step_{step:08d}")
        assert sorted(before) == sorted(after)
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def _resave(rank: int, world_size: int, sections: Sections, step: int) -> None:
    config = tiny_config(**sections)
    with start_session(rank, world_size, config) as session:
        run = Run(config, session)
        manager = manager_of(config, session)
        state = manager.restore_latest(run.chunks, run.optimizer)
        assert {group["step"] for group in run.optimizer.param_groups} == {2}
        manager.save(step, run.chunks, run.optimizer, state)


def _with_expert(rank: int, world_size: int, sections: Sections, step: int) -> None:
    """Adds a parameter for which core makes a second optimizer when experts are spread over ranks."""
    config = tiny_config(**sections)
    with start_session(rank, world_size, config) as session:
        run = Run(config, session, num_experts=4)
        manager = manager_of(config, session, num_experts=4)
        assert len(run.optimizer.chained_optimizers) == session.groups.ep.size()
        state = manager.restore_latest(run.chunks, run.optimizer)
        if state is None:
            run.step(1)
        manager.save(step, run.chunks, run.optimizer, {})


def test_expert_parallel_and_one_rank_read_each_other(tmp_path: Path) -> None:
    """Core prefixes optimizer keys with ``chained_0.`` where it has two optimizers; ours have no prefix."""
    sections = _sections(tmp_path)
    sections["checkpoint"]["keep_last"] = 10
    for step, ranks in enumerate((1, 2, 1), start=1):
        run_ranks(ranks, _with_expert, {**sections, "parallel": {"ep": ranks}}, step)
    first, second, third = (read_whole(tmp_path / f"step_0000000{step}") for step in (1, 2, 3))
    assert "optimizer.state.exp_avg.experts" in first
    assert float(first["optimizer.state.exp_avg.experts"].abs().min()) > 0
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    torch.testing.assert_close(third, first, rtol=0, atol=0)


def _nothing_to_train(rank: int, world_size: int, sections: Sections) -> list[str]:
    """Saves before the first step and after it, and restores."""
    config = tiny_config(**sections)
    with start_session(rank, world_size, config) as session:
        run = Run(config, session, frozen=True)
        manager = manager_of(config, session)
        manager.save(0, run.chunks, run.optimizer, TrainingState().to_dict())
        run.step(1)
        manager.save(1, run.chunks, run.optimizer, TrainingState(step=1).to_dict())
        again = Run(config, session, frozen=True)
        assert manager.restore_latest(again.chunks, again.optimizer) == TrainingState(step=1).to_dict()
        torch.testing.assert_close(again.weights(), run.weights(), rtol=0, atol=0)
        return sorted(path.name for path in Path(config.checkpoint.directory).iterdir())


@pytest.mark.parametrize("distributed", [True, False])
def test_nothing_to_train_is_saved_and_restored(distributed: bool, tmp_path: Path) -> None:
    """One stage with nothing to train beside others is in test_checkpoint_layouts.py."""
    sections = _sections(tmp_path, parallel={"tp": 2}, optimizer={"distributed": distributed})
    for names in run_ranks(2, _nothing_to_train, sections):
        assert names == ["step_00000000", "step_00000001"]


def _generators(rank: int, world_size: int, sections: Sections) -> list[float]:
    config = tiny_config(**sections)
    draws = []
    with start_session(rank, world_size, config) as session:
        run = Run(config, session)
        manager = manager_of(config, session)
        if manager.restore_latest(run.chunks, run.optimizer) is None:
            manager.save(1, run.chunks, run.optimizer, {})
        draws = [random.random(), float(np.random.rand()), float(torch.rand(())), float(rank)]
        with get_cuda_rng_tracker().fork():
            draws.append(float(torch.rand(())))
    return draws


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    sections = _sections(tmp_path, parallel={"tp": 2})
    first = run_ranks(2, _generators, sections)
    assert run_ranks(2, _generators, {**sections, "training": {"seed": 99}}) == first
    assert first[0][4] != first[1][4]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    sections = {"checkpoint": {"directory": str(tmp_path), "keep_last": 2}}
    run_ranks(1, _train, sections, [1, 2, 3, 4], (1, 2, 3, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def test_a_partial_folder_is_not_read_and_is_cleaned_up(tmp_path: Path) -> None:
    sections = _sections(tmp_path)
    run_ranks(1, _train, sections, [1], (1,))
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000001.partial")
    ((_, _, restored),) = run_ranks(1, _train, sections, [1, 2], (2,))
    assert restored is None
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def _killed_while_saving(rank: int, world_size: int, sections: Sections) -> None:
    """Rank 1 dies in the middle of writing its part of the second checkpoint."""
    config = tiny_config(**sections)
    with start_session(rank, world_size, config) as session:
        run = Run(config, session)
        manager = manager_of(config, session)
        run.step(1)
        manager.save(1, run.chunks, run.optimizer, TrainingState(step=1).to_dict())
        if rank == 1:
            filesystem_async.FileSystemWriterAsync.write_preloaded_data = _die_halfway
        manager.save(2, run.chunks, run.optimizer, TrainingState(step=2).to_dict())


def _die_halfway(*_: Any, write_bucket: Any, **__: Any) -> None:
    Path(write_bucket[0]).write_bytes(b"the first half")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_save_killed_halfway_is_never_taken_and_does_not_hang(tmp_path: Path) -> None:
    sections = _sections(tmp_path, parallel={"tp": 2})
    started = time.monotonic()
    with pytest.raises(RankFailure, match="rank 1 of 2 failed:\nthe process died"):
        run_ranks(2, _killed_while_saving, sections, timeout=120)
    assert time.monotonic() - started < 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002.partial"]
    for _, _, restored in run_ranks(2, _train, sections, [2], (2,)):
        assert restored["step"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def _user_error(rank: int, world_size: int, sections: Sections, initial_weights: str | None = None) -> str:
    """The message with which restoring is refused."""
    config = tiny_config(**sections)
    with start_session(rank, world_size, config) as session:
        run = Run(config, session)
        manager = manager_of(config, session)
        try:
            if initial_weights is None:
                manager.restore_latest(run.chunks, run.optimizer)
            else:
                manager.load_weights(Path(initial_weights), run.chunks)
        except UserError as error:
            return str(error)
    return ""


def _refusals(sections: Sections, initial_weights: str | None = None) -> str:
    """Both ranks refuse with the same single line."""
    first, second = run_ranks(2, _user_error, sections, initial_weights)
    assert first == second != ""
    assert "\n" not in first
    return first


def test_another_model_is_refused_field_by_field(tmp_path: Path) -> None:
    run_ranks(1, _train, _sections(tmp_path), [1], (1,))
    model = tiny_config().model
    other = dataclasses.replace(model, language=dataclasses.replace(model.language, num_layers=3, rope_theta=5e5))
    message = _refusals(_sections(tmp_path, model=other))
    assert "model.language.num_layers is 2 there, 3 here" in message
    assert "model.language.rope_theta is 1000000.0 there, 500000.0 here" in message


def test_a_setting_younger_than_the_checkpoint_has_its_default(tmp_path: Path) -> None:
    run_ranks(1, _train, _sections(tmp_path), [1], (1,))
    path = tmp_path / "step_00000001" / "navil_config.json"
    stored = json.loads(path.read_text())
    del stored["model"]["language"]["qkv_bias"]
    path.write_text(json.dumps(stored))
    require_same_model(path.parent, tiny_config())


def test_a_checkpoint_older_than_the_name_of_a_setting_goes_on(tmp_path: Path) -> None:
    run_ranks(1, _train, _sections(tmp_path), [1], (1,))
    path = tmp_path / "step_00000001" / "navil_config.json"
    stored = json.loads(path.read_text())
    stored["training"]["precision"] = stored.pop("precision")["type"]
    path.write_text(json.dumps(stored))
    require_same_optimizer(path.parent, tiny_config())
    with pytest.raises(UserError, match="precision.type is 'fp32' there, 'bf16' here"):
        require_same_optimizer(path.parent, tiny_config(precision={"type": "bf16"}))


def test_another_phase_is_refused(tmp_path: Path) -> None:
    run_ranks(1, _train, _sections(tmp_path), [1], (1,))
    message = _refusals(_sections(tmp_path, training={"phase": "s1.1"}))
    assert "training.phase is 's2' there, 's1.1' here" in message
    assert "checkpoint.initial_weights" in message


@pytest.mark.parametrize("victim", [".metadata", "__0_0.distcp", "metadata.json", "navil_config.json"])
def test_a_damaged_checkpoint_is_named(victim: str, tmp_path: Path) -> None:
    run_ranks(2, _train, _sections(tmp_path, parallel={"tp": 2}), [1], (1,))
    path = tmp_path / "step_00000001" / victim
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = _refusals(_sections(tmp_path, parallel={"tp": 2}))
    assert "damaged" in message and str(tmp_path / "step_00000001") in message


class _Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def _bomb_in_metadata(folder: Path, bomb: _Bomb) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps({"bomb": bomb}))


def _bomb_in_the_common_state(folder: Path, bomb: _Bomb) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (place,) = (info for index, info in metadata.storage_data.items() if index.fqn.startswith("common_state"))
    place.relative_path, place.offset = "__9_0.distcp", 0
    torch.save([bomb], folder / place.relative_path)
    place.length = (folder / place.relative_path).stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("hide", [_bomb_in_metadata, _bomb_in_the_common_state])
def test_nothing_in_a_checkpoint_is_executed(hide: Callable[[Path, _Bomb], None], tmp_path: Path) -> None:
    run_ranks(1, _train, _sections(tmp_path / "run"), [1], (1,))
    hide(tmp_path / "run" / "step_00000001", _Bomb(tmp_path / "exploded"))
    for sections, initial in ((_sections(tmp_path / "run"), None), (_sections(tmp_path / "new"), tmp_path / "run")):
        message = _refusals(sections, None if initial is None else str(initial))
        assert "holds 'posix.system', which is not part of such data" in message
    assert not (tmp_path / "exploded").exists()


def _weights_of(rank: int, world_size: int, sections: Sections, folder: str) -> dict[str, torch.Tensor]:
    config = tiny_config(**sections)
    with start_session(rank, world_size, config) as session:
        run = Run(config, session)
        manager_of(config, session).load_weights(Path(folder), run.chunks)
        return run.weights()


@pytest.mark.parametrize("inside", ["", "step_00000002"])
def test_initial_weights_come_alone_from_a_run_or_a_checkpoint(inside: str, tmp_path: Path) -> None:
    ((expected, _, _),) = run_ranks(1, _train, _sections(tmp_path), [1, 2], (1, 2))
    elsewhere = _sections(tmp_path / "elsewhere", training={"phase": "s1.1"})
    for weights in run_ranks(2, _weights_of, elsewhere, str(tmp_path / inside)):
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_missing_unexpected_and_misshapen_weights_are_listed_together(tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    run_ranks(1, _save_foreign, str(folder))
    message = _refusals(_sections(tmp_path / "run"), str(folder))
    assert "down.weight is missing" in message
    assert "extra.weight is unexpected" in message
    assert "up.weight is [3, 3] there, [12, 8] in the model" in message


def _save_foreign(rank: int, world_size: int, folder: str) -> None:
    with start_session(rank, world_size):
        Path(folder).mkdir()
        weights = {"up.weight": torch.ones(3, 3), "extra.weight": torch.ones(2), "norm.weight": torch.ones(8)}
        state = {
            key: dist_checkpointing.ShardedTensor.from_rank_offsets(key, weight) for key, weight in weights.items()
        }
        filesystem_async._results_queue = queue.Queue()
        dist_checkpointing.save(state, folder)
        (Path(folder) / "navil_config.json").write_text(json.dumps(dataclasses.asdict(tiny_config())))


def test_no_initial_weights_is_one_clear_line(tmp_path: Path) -> None:
    assert "holds no checkpoint" in _refusals(_sections(tmp_path), str(tmp_path / "nowhere"))


def _processes_after_saving(rank: int, world_size: int, sections: Sections) -> list[str]:
    config = tiny_config(**sections)
    with start_session(rank, world_size, config) as session:
        run = Run(config, session)
        manager_of(config, session).save(1, run.chunks, run.optimizer, {})
        return [process.name for process in multiprocessing.active_children()]


def test_a_save_starts_no_process(tmp_path: Path) -> None:
    """Core's own way starts a server process that imports the main module again: eight seconds a rank."""
    assert run_ranks(2, _processes_after_saving, _sections(tmp_path)) == [[], []]
