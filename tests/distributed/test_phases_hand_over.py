"""One phase starts from the one before: weights, and by choice its optimizer state; what joins has clean moments."""

from pathlib import Path
from typing import Any

import pytest
import torch

from navil_megatron.blueprint.parameters import is_trainable, parameter_of
from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.models.build import build_model
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step
from tests.distributed.test_checkpoint_layouts import read_whole
from tests.distributed.test_layouts import BATCH, LAYOUTS
from tests.oracle import global_batch, global_loss, merge_sections, oracle_config
from tests.ranks import RankFailure, run_ranks, start_session
from tests.tolerances import RANKS

STEPS = 2
ONE_RANK: tuple[int, dict[str, Any]] = (1, {})
PAIRS = [("tp2-sp", "pp2-uneven"), ("dp2-distributed-optimizer", "ep2-distributed-optimizer"), ("pp2", "tp2-sp-pp2")]


def phase(rank: int, world_size: int, sections: dict, before: str | None, folder: str, kept: bool) -> list[float]:
    """A few steps of a phase, which start from the one before; saved before the first step and after the last."""
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        model = build_model(config, session.groups, session.device)
        manager = CheckpointManager(config, session)
        if before is not None:
            manager.load_weights(Path(before), model)
        chunks = wrap_ddp(config, session, model)
        optimizer = build_optimizer(config, chunks, session)
        if before is not None and kept:
            manager.load_optimizer(Path(before), model, optimizer)
        manager.directory = Path(folder)
        manager.save(0, model, optimizer, {})
        batch = global_batch(config, BATCH, session)
        share = len(batch) // session.groups.dp.size()
        mine = batch[session.groups.dp.rank() * share : (session.groups.dp.rank() + 1) * share]
        losses = [
            global_loss(train_step(config, session, chunks, optimizer, mine, lr=1e-2), session) for _ in range(STEPS)
        ]
        manager.save(STEPS, model, optimizer, {})
        return losses


def run_phase(layout: tuple[int, dict], name: str, before: Path | None, folder: Path, **options: Any) -> list[float]:
    world_size, sections = layout
    precision = {"type": options.get("precision", "fp32")}
    wanted = merge_sections(sections, {"training": {"phase": name}, "precision": precision})
    start = None if before is None else str(before)
    return run_ranks(world_size, phase, wanted, start, str(folder), options.get("kept", True))[0]


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return read_whole(folder / f"step_{step:08d}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_moments_are_kept_and_new_ones_are_clean(source: str, target: str, precision: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_phase(LAYOUTS[source], "s1.1", None, first, precision=precision)
    run_phase(LAYOUTS[target], "s1.2", first, second, precision=precision)
    old, new = state(first, STEPS), state(second, 0)
    joined = 0
    for key, tensor in new.items():
        if key in old:
            assert torch.equal(tensor, old[key]), key
        elif ".exp_avg" in key:
            assert not tensor.any(), key
            joined += 1
        else:
            weight = new[key.split(".", 3)[3]]
            assert torch.equal(tensor, weight.to(tensor.dtype)), key
    assert joined > 0
    assert all(key in new for key in old if key.startswith("optimizer."))


@pytest.mark.parametrize("target", ["tp2-sp", "pp2-uneven", "cp2-distributed-optimizer"])
def test_what_follows_is_the_same_at_every_layout(target: str, tmp_path: Path) -> None:
    first = tmp_path / "first"
    run_phase(ONE_RANK, "s1.1", None, first)
    expected = run_phase(ONE_RANK, "s2", first, tmp_path / "one")
    torch.testing.assert_close(run_phase(LAYOUTS[target], "s2", first, tmp_path / "many"), expected, **RANKS)


def test_a_fresh_optimizer_forgets(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_phase(ONE_RANK, "s1.1", None, first)
    run_phase(ONE_RANK, "s1.2", first, second, kept=False)
    moments = {key: tensor for key, tensor in state(second, 0).items() if ".exp_avg" in key}
    assert moments and not any(tensor.any() for tensor in moments.values())


def test_frozen_weights_do_not_move(tmp_path: Path) -> None:
    first = tmp_path / "first"
    run_phase(ONE_RANK, "s1.1", None, first)
    before, after = state(first, 0), state(first, STEPS)
    model = oracle_config().model
    for key, tensor in before.items():
        if not key.startswith("optimizer."):
            assert torch.equal(tensor, after[key]) != is_trainable(parameter_of(model, key).part, "s1.1"), key


def test_state_of_another_form_is_refused(tmp_path: Path) -> None:
    first = tmp_path / "first"
    run_phase(ONE_RANK, "s1.1", None, first)
    with pytest.raises(RankFailure, match="precision.type is 'fp32' there, 'bf16' here; set these alike"):
        run_phase(ONE_RANK, "s1.2", first, tmp_path / "second", precision="bf16")
