"""The bytes that a layout sends are known: what ``tools/bench/layouts.py`` counts equals its formula on every rank."""

import functools
from typing import Any

import pytest
import torch

from navil_megatron.layers.collectives import all_gather_single, reduce_scatter_single
from navil_megatron.planner.communication import Traffic, buffer_size
from tests.oracle import MIXED, TEXT_ONLY, global_batch, oracle_config
from tests.ranks import run_ranks, start_session
from tools.bench.layouts import Trainer, compare, traffic_by_formula
from tools.bench.traffic_count import CountTraffic

BATCH = (MIXED, TEXT_ONLY, TEXT_ONLY, MIXED)
NOT_SPLIT = {"optimizer": {"distributed": False}}
TP2_SP = {"tp": 2, "sequence_parallel": True}
TIED = {"language": {"tied_embeddings": True}}
BF16 = {"precision": {"type": "bf16"}}
COMPOSED = {"language": {"family": "internlm2", "qk_norm": False, "composed_visual_output_projection": True}}

EXPERTS = {"language": {"num_experts": 4, "experts_per_token": 2}}

LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "tp2": (2, {"parallel": {"tp": 2}}),
    "tp2-sp": (2, {"parallel": TP2_SP}),
    "tp2-sp-composed": (2, {"parallel": TP2_SP, "model": COMPOSED}),
    "tp2-sp-bf16": (2, {"parallel": TP2_SP, **BF16}),
    "tp2-recompute": (2, {"parallel": {"tp": 2}, "training": {"recompute": "full"}}),
    "tp2-sp-recompute": (2, {"parallel": TP2_SP, "training": {"recompute": "full"}}),
    "tp2-sp-mlp-recompute": (
        2,
        {"parallel": TP2_SP, "training": {"recompute": "selective", "recompute_modules": ("mlp",)}},
    ),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "pp2-uneven": (2, {"parallel": {"pp": 2, "pipeline_layers": (1, 3)}}),
    "pp2-interleaved-tied": (2, {"parallel": {"pp": 2, "vpp": 2}, "model": TIED}),
    "dp2": (2, NOT_SPLIT),
    "dp2-distributed": (2, {}),
    "dp2-distributed-bf16": (2, BF16),
    "cp2": (2, {"parallel": {"cp": 2}, **NOT_SPLIT}),
    "cp2-distributed-bf16": (2, {"parallel": {"cp": 2}, **BF16}),
    "cp2-recompute": (2, {"parallel": {"cp": 2}, "training": {"recompute": "full"}}),
    "cp2-selective-recompute": (2, {"parallel": {"cp": 2}, "training": {"recompute": "selective"}}),
    "ep2": (2, {"parallel": {"ep": 2}, **NOT_SPLIT}),
    "ep2-distributed": (2, {"parallel": {"ep": 2}}),
    "dp2-experts": (2, {"model": EXPERTS, **NOT_SPLIT}),
    "dp2-experts-distributed": (2, {"model": EXPERTS}),
}
AXES = {"tp2-sp": "tp", "pp2": "pp", "pp2-interleaved-tied": "embd", "dp2": "dp", "cp2": "cp", "ep2": "ep"}


def count(rank: int, world_size: int, sections: dict) -> list[dict[str, Any]]:
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        trainer = Trainer(config, session, global_batch(config, BATCH, session))
        trainer.step()
        return compare(trainer.counted_step(), traffic_by_formula(trainer.view()))


@functools.cache
def counts(layout: str) -> list[list[dict[str, Any]]]:
    world_size, sections = LAYOUTS[layout]
    return run_ranks(world_size, count, sections)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counted_bytes_equal_the_formula(layout: str) -> None:
    for entries in counts(layout):
        assert entries
        assert [entry for entry in entries if not entry["equal"]] == []


@pytest.mark.parametrize("layout", AXES)
def test_the_axis_of_a_layout_carries_bytes(layout: str) -> None:
    for entries in counts(layout):
        assert sum(entry["bytes"] for entry in entries if entry["axis"] == AXES[layout]) > 0


def count_known_collectives(rank: int, world_size: int) -> list[tuple[str, str, int, int]]:
    """A tensor of 6 floats through each kind of collective."""
    with start_session(rank, world_size) as session, CountTraffic(session.groups) as counting:
        whole, half = torch.zeros(6), torch.zeros(3)
        torch.distributed.all_reduce(whole, group=session.groups.dp)
        all_gather_single(whole, half, group=session.groups.dp_cp)
        reduce_scatter_single(half, whole, group=session.groups.dp_cp)
        torch.distributed.all_to_all_single(torch.zeros(6), whole, group=session.groups.dp)
        torch.distributed.all_reduce(whole, group=session.groups.tp)  # a group of one: nothing is sent
        torch.distributed.all_reduce(whole)
    return sorted((*key, *traffic) for key, traffic in counting.found.items())


def test_payload_is_the_whole_tensor() -> None:
    for found in run_ranks(2, count_known_collectives):
        assert found == [
            ("dp", "all-gather", 1, 24),
            ("dp", "all-reduce", 1, 24),
            ("dp", "all-to-all", 1, 24),
            ("dp", "reduce-scatter", 1, 24),
            ("world", "all-reduce", 1, 24),
        ]


def test_traffic_adds_up() -> None:
    assert Traffic(1, 24) + Traffic(2, 6) == Traffic(3, 30)


def test_the_distributed_optimizer_pads_each_parameter_and_the_buffer() -> None:
    assert buffer_size([64, 1, 65], ranks=2) == 256
    assert buffer_size([64, 65], ranks=2) == 256
    assert buffer_size([128], ranks=3) == 384
