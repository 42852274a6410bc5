"""Checkpoints belong to no layout: saved anywhere, restored anywhere, bit for bit, and training goes on the same."""

import random
from pathlib import Path

import pytest
import torch

from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.models.build import build_model
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step
from tests.distributed.test_layouts import BATCH, LAYOUTS
from tests.oracle import global_batch, global_loss, merge_sections, oracle_config
from tests.ranks import run_ranks, start_session
from tests.tolerances import RESTORED
from tests.whole import read_whole
from tests.whole_checkpoint import read_tensors

ONE_RANK = (1, {})
SAVED_AFTER, STEPS = 2, 3
SEED, PAIRS_IN_CI, PAIRS_IN_ALL = 20_251_010, 4, 64
# How recompute is chosen is no part of a layout's checkpoint.
PLACES = {name: layout for name, layout in LAYOUTS.items() if "recompute" not in name} | {"one-rank": ONE_RANK}


def run(rank: int, world_size: int, sections: dict, source: str | None, target: str, until: int) -> list[float]:
    """Restore from ``source`` (or start), save what was restored to ``target``, then train up to step ``until``."""
    config = oracle_config(**merge_sections(sections, {"checkpoint": {"directory": source or target, "keep_last": 9}}))
    with start_session(rank, world_size, config) as session:
        model = build_model(config, session.groups, session.device)
        chunks = wrap_ddp(config, session, model)
        optimizer = build_optimizer(config, chunks, session)
        manager = CheckpointManager(config, session)
        state = manager.restore_latest(model, optimizer)
        step = 0 if state is None else int(state["step"])
        manager.directory = Path(target)
        if state is not None:
            manager.save(step, model, optimizer, {"step": step})
        batch = global_batch(config, BATCH, session)
        share = len(batch) // session.groups.dp.size()
        mine = batch[session.groups.dp.rank() * share : (session.groups.dp.rank() + 1) * share]
        losses = []
        while step < until:
            losses.append(global_loss(train_step(config, session, chunks, optimizer, mine, lr=1e-2), session))
            step += 1
        if state is None or until > SAVED_AFTER:
            manager.save(step, model, optimizer, {"step": step})
        return losses


def check_pair(source: tuple[int, dict], target: tuple[int, dict], tmp_path: Path) -> None:
    first, again = str(tmp_path / "first"), str(tmp_path / "again")
    source_ranks, source_sections = source
    target_ranks, target_sections = target
    optimizer = source_sections.get("optimizer", {})
    target_sections = merge_sections(
        target_sections, {"optimizer": {"distributed": optimizer.get("distributed", True)}}
    )
    run_ranks(source_ranks, run, source_sections, None, first, SAVED_AFTER)
    straight = run_ranks(source_ranks, run, source_sections, None, str(tmp_path / "straight"), STEPS)[0]
    resumed = run_ranks(target_ranks, run, target_sections, first, again, STEPS)[0]

    saved, restored = (read_whole(Path(folder) / f"step_{SAVED_AFTER:08d}") for folder in (first, again))
    assert saved.keys() == restored.keys()
    assert any(key.startswith("optimizer.") for key in saved)
    for key, tensor in saved.items():
        assert torch.equal(tensor, restored[key]), key
    torch.testing.assert_close(resumed, straight[SAVED_AFTER:], **RESTORED)
    end, straight_end = (read_tensors(Path(folder) / f"step_{STEPS:08d}") for folder in (again, tmp_path / "straight"))
    for key, tensor in straight_end.items():
        torch.testing.assert_close(end[key], tensor, **RESTORED, msg=lambda m, k=key: f"{k}: {m}")


def drawn_pairs(count: int) -> list[tuple[str, str]]:
    """Pairs of layouts, the same for one seed; each layout is once a source before any is twice."""
    draw = random.Random(SEED)
    sources = sorted(PLACES)
    draw.shuffle(sources)
    return [(sources[n % len(sources)], draw.choice(sorted(PLACES))) for n in range(count)]


@pytest.mark.parametrize(("source", "target"), [("tp2-sp-pp2", "one-rank"), ("one-rank", "pp2-interleaved")])
def test_one_rank_and_many(source: str, target: str, tmp_path: Path) -> None:
    check_pair(PLACES[source], PLACES[target], tmp_path)


@pytest.mark.parametrize(("distributed", "saves"), [(True, "stages"), (False, "one rank")])
def test_a_stage_with_nothing_to_train(distributed: bool, saves: str, tmp_path: Path) -> None:
    """In the first phase a last stage without decoder layers holds frozen weights alone."""
    frozen = {"training": {"phase": "s1.1"}, "optimizer": {"distributed": distributed}}
    stages = (2, {**frozen, "parallel": {"pp": 2, "pipeline_layers": (4, 0)}})
    one_rank = (1, frozen)
    check_pair(*((stages, one_rank) if saves == "stages" else (one_rank, stages)), tmp_path)


@pytest.mark.parametrize(("source", "target"), drawn_pairs(PAIRS_IN_CI))
def test_drawn_pairs(source: str, target: str, tmp_path: Path) -> None:
    check_pair(PLACES[source], PLACES[target], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), drawn_pairs(PAIRS_IN_ALL)[PAIRS_IN_CI:])
def test_many_more_drawn_pairs(source: str, target: str, tmp_path: Path) -> None:
    check_pair(PLACES[source], PLACES[target], tmp_path)
