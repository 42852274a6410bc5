"""Models with several experts per modality: every layout is one rank, checkpoints belong to no layout, loads are
counted once, and a model widened by ``convert upcycle`` starts as the one it was.
"""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.hf.upcycle import convert_upcycle
from navil_megatron.models.build import build_model
from navil_megatron.training.expert_load import ExpertLoad, balance
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import evaluate_step, train_step
from tests.distributed.test_checkpoint_layouts import check_pair
from tests.oracle import (
    IMAGE_ONLY,
    MIXED,
    TEXT_ONLY,
    TINY_IMAGE,
    Outcome,
    compare,
    global_batch,
    global_loss,
    merge_sections,
    oracle_config,
    run_steps,
)
from tests.ranks import run_ranks, start_session
from tests.tolerances import RANKS

BATCH = (MIXED, TEXT_ONLY, IMAGE_ONLY, TINY_IMAGE)
ONE: dict[str, Any] = {"model": {"language": {"num_layers": 2}}}
ROUTED: dict[str, Any] = {
    "model": {"language": {"num_layers": 2, "num_experts": 4, "experts_per_token": 2}},
    "training": {"router_aux_loss": 0.5, "router_z_loss": 0.1},
}
NARROW = {"model": {"language": {"num_layers": 2, "num_experts": 2, "experts_per_token": 1}}}
DEEP = {"model": {"language": {"num_layers": 4, "num_experts": 4, "experts_per_token": 1}}}
MODELS = {"narrow": merge_sections(ROUTED, NARROW), "four": ROUTED, "deep": merge_sections(ROUTED, DEEP)}
"""Two experts, one a token; four, two a token; four, one a token, in layers for an interleaved pipeline."""
SELECTIVE = {"training": {"recompute": "selective", "recompute_modules": ("attention", "mlp", "encoder")}}
SP = {"tp": 2, "sequence_parallel": True}
NOT_SPLIT = {"optimizer": {"distributed": False}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-sp": (2, {"parallel": SP, "training": {"recompute": "full"}}),
    "tp2-sp-etp1": (2, {"parallel": {**SP, "etp": 1}, **SELECTIVE, **NOT_SPLIT}),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "dp2": (2, NOT_SPLIT),
    "cp2": (2, {"parallel": {"cp": 2}, **NOT_SPLIT}),
    "cp2-ep2": (2, {"parallel": {"cp": 2, "ep": 2}, **NOT_SPLIT}),
    "ep2": (2, {"parallel": {"ep": 2}, **SELECTIVE, **NOT_SPLIT}),
    "ep4": (4, {"parallel": {"ep": 4}, "training": {"recompute": "full"}, **NOT_SPLIT}),
    "ep2-tp2-sp": (4, {"parallel": {**SP, "ep": 2}, **NOT_SPLIT}),
    "ep4-tp2-sp-etp1": (4, {"parallel": {**SP, "ep": 4, "etp": 1}}),
}
PIPELINES: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2-interleaved": (2, {"parallel": {"pp": 2, "vpp": 2}}),
    "ep2-pp2-interleaved": (4, {"parallel": {"ep": 2, "pp": 2, "vpp": 2}, **NOT_SPLIT}),
}


@functools.cache
def _one_rank(model: str, batch: tuple) -> Outcome:
    (outcome,) = run_ranks(1, run_steps, MODELS[model], batch)
    return outcome


def _check(layout: str, model: str, batch: tuple) -> None:
    world_size, sections = {**LAYOUTS, **PIPELINES}[layout]
    found = run_ranks(world_size, run_steps, merge_sections(MODELS[model], sections), batch)
    compare(found, _one_rank(model, batch), **RANKS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_rank(layout: str) -> None:
    """Balance losses are on: they are means over the global batch, however it is cut."""
    _check(layout, "four", BATCH)


@pytest.mark.parametrize("layout", PIPELINES)
def test_interleaved_pipeline_equals_one_rank(layout: str) -> None:
    _check(layout, "deep", BATCH)


@pytest.mark.parametrize("phase", ["s1.1", "s1.2"])
def test_phases_that_freeze_equal_one_rank(phase: str) -> None:
    sections = merge_sections(ROUTED, {"training": {"phase": phase, **ROUTED["training"]}})
    (expected,) = run_ranks(1, run_steps, sections, BATCH)
    found = run_ranks(2, run_steps, merge_sections(sections, {"parallel": {"ep": 2}, **NOT_SPLIT}), BATCH)
    compare(found, expected, **RANKS)


@pytest.mark.parametrize("batch", [(TEXT_ONLY,) * 4, (IMAGE_ONLY, TEXT_ONLY) * 2])
def test_absent_modalities_neither_hang_nor_lose_gradients(batch: tuple) -> None:
    """Each rank holds one expert of one modality, and some ranks no row."""
    _check("ep4", "narrow", batch)


def _load_after_a_step(rank: int, world_size: int, sections: dict) -> torch.Tensor:
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        load = ExpertLoad(chunks, 2, 4)
        mine = global_batch(config, BATCH, session)
        train_step(config, session, chunks, build_optimizer(config, chunks, session), mine, lr=0.0)
        counts = load.take(session.device)
        assert not load.take(session.device).any()
        torch.distributed.all_reduce(counts)
        return counts


def test_load_counts_every_token_once_and_no_padding() -> None:
    tokens = sum(microbatch.num_tokens for microbatch in global_batch(oracle_config(**ROUTED), BATCH))
    (one,) = run_ranks(1, _load_after_a_step, ROUTED)
    assert one[..., :4].sum((1, 2)).tolist() == [2 * tokens] * 2
    assert one[..., 4].sum(1).tolist() == [tokens] * 2
    for sums in run_ranks(2, _load_after_a_step, merge_sections(ROUTED, LAYOUTS["tp2-sp"][1])):
        assert torch.equal(sums[..., :5], one[..., :5])
        torch.testing.assert_close(sums, one, **RANKS)
    record = balance(one)
    assert 1 < record["visual_expert_imbalance"] <= record["visual_expert_imbalance_worst_layer"] <= 4
    assert 0 < record["text_router_entropy"] < 1 and record["text_router_z_loss"] > 0


def test_balance_of_known_sums() -> None:
    """Two layers, two experts: in the first they carry 6 and 2 of 8 choices, in the second 4 and 4; no visual token."""
    text = [[6.0, 2.0, 8.0, 0.0, 12.0, 4.0], [4.0, 4.0, 8.0, 8 * math.log(2), 8.0, 8.0]]
    assert balance(torch.tensor([[layer, [0.0] * 6] for layer in text])) == pytest.approx(
        {
            "text_expert_imbalance": 1.25,
            "text_expert_imbalance_worst_layer": 1.5,
            "text_router_entropy": 0.5,
            "text_router_aux_loss": 1.25,
            "text_router_z_loss": 0.75,
        }
    )
    assert balance(torch.zeros(2, 2, 0)) == {}


@pytest.mark.parametrize(("source", "target"), [("ep4", "tp2-sp-etp1"), ("tp2-sp", "ep2")])
def test_saved_at_one_layout_restored_at_another(source: str, target: str, tmp_path: Path) -> None:
    places = [(LAYOUTS[name][0], merge_sections(ROUTED, LAYOUTS[name][1])) for name in (source, target)]
    check_pair(*places, tmp_path)


def _save(rank: int, world_size: int, sections: dict) -> None:
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        CheckpointManager(config, session).save(0, chunks, build_optimizer(config, chunks, session), {})


def _evaluate(rank: int, world_size: int, sections: dict, weights: Path) -> float:
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        model = build_model(config, session.groups, session.device)
        CheckpointManager(config, session).load_weights(weights, model)
        batch = global_batch(config, BATCH, session)
        share = len(batch) // session.groups.dp.size()
        mine = batch[session.groups.dp.rank() * share : (session.groups.dp.rank() + 1) * share]
        return global_loss(evaluate_step(config, session, wrap_ddp(config, session, model), mine), session)


@pytest.mark.parametrize("times", [1, 2])
def test_an_upcycled_checkpoint_starts_as_the_model_it_came_from(times: int, tmp_path: Path) -> None:
    one = merge_sections(ONE, {"checkpoint": {"directory": str(tmp_path / "one")}, "training": {"seed": 7}})
    run_ranks(1, _save, one)
    convert_upcycle(tmp_path / "one", tmp_path / "several", num_experts=4, experts_per_token=times)
    (expected,) = run_ranks(1, _evaluate, ONE, tmp_path / "one")
    widened = {"model": {"language": {"num_layers": 2, "num_experts": 4, "experts_per_token": times}}}
    for world_size, sections in ((1, {}), LAYOUTS["ep4"]):
        found = run_ranks(world_size, _evaluate, merge_sections(widened, sections), tmp_path / "several")
        assert found == pytest.approx([expected] * world_size, rel=RANKS["rtol"])
