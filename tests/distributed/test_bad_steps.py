"""A step with a bad number leaves weights, moments and Adam's count of steps as they were, on every rank."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from navil_megatron.checkpoint.finite import require_finite
from navil_megatron.checkpoint.updated_parameters import updated_parameters
from navil_megatron.config.errors import BadNumbers
from navil_megatron.data.types import Microbatch
from navil_megatron.models.build import build_model
from navil_megatron.training.expert_load import ExpertLoad
from navil_megatron.training.number_watch import NumberWatch
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.overlap import gather_parameters
from navil_megatron.training.state import TrainingState
from navil_megatron.training.step import train_step
from tests.oracle import IMAGE_ONLY, MIXED, TEXT_ONLY, global_batch, merge_sections, oracle_config
from tests.ranks import run_ranks, start_session

BATCH = (MIXED, IMAGE_ONLY, TEXT_ONLY, MIXED)
BF16 = {"precision": {"type": "bf16"}}
OVERLAP = {"optimizer": {"overlap_grad_reduce": True, "overlap_param_gather": True}}
EXPERTS = {"model": {"language": {"num_experts": 4, "experts_per_token": 2}}}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank, fp32": (1, {"optimizer": {"distributed": False}}),
    "data, fp32": (2, {"optimizer": {"distributed": False}}),
    "data, bf16, overlap": (2, merge_sections(BF16, OVERLAP)),
    "tensor, bf16": (2, merge_sections(BF16, {"parallel": {"tp": 2, "sequence_parallel": True}})),
    "pipeline, fp32": (2, {"parallel": {"pp": 2}}),
    "pipeline, bf16, interleaved": (2, merge_sections(BF16, {"parallel": {"pp": 2, "vpp": 2}})),
    "experts, bf16": (2, merge_sections(BF16, merge_sections(EXPERTS, {"parallel": {"ep": 2}}))),
}
SOUND, POISONED = "sound", "pixel"


def state_of(chunks: list, optimizer: Any) -> dict[str, Tensor]:
    """Copies of all that an update changes on this rank."""
    gather_parameters(chunks)
    found = {f"{n} {name}": p for n, chunk in enumerate(chunks) for name, p in chunk.named_parameters()}
    for number, part in enumerate(optimizer.chained_optimizers):
        for place, (_, updated) in enumerate(updated_parameters(part)):
            found[f"{number} copy {place}"] = updated
            found |= {f"{number} {kind} {place}": moment for kind, moment in part.optimizer.state[updated].items()}
    copies = {name: tensor.detach().clone() for name, tensor in found.items()}
    return copies | {"updates": torch.tensor([group["step"] for group in optimizer.param_groups])}


def poisoned(rows: list[Microbatch]) -> Iterator[Microbatch]:
    """The rows with one pixel that is none in the first of them that has pixels here."""
    is_done = False
    for row in rows:
        if not is_done and row.pixel_values is not None and len(row.pixel_values):
            pixels, is_done = row.pixel_values.float() / 255, True
            pixels[0, 0] = math.nan
            row = dataclasses.replace(row, pixel_values=pixels)
        yield row


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steps(rank: int, world_size: int, sections: dict, faults: tuple[str, ...]) -> dict[str, Any]:
    """Steps in a row; a step with a fault is given one on the last rank that can have it."""
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        model = build_model(config, session.groups, session.device)
        chunks = wrap_ddp(config, session, model)
        optimizer = build_optimizer(config, chunks, session)
        language = config.model.language
        load = ExpertLoad(model, language.num_layers, language.num_experts)
        batch = global_batch(config, BATCH, session)
        replica, num_replicas = session.groups.dp.rank(), session.groups.dp.size()
        share = len(batch) // num_replicas
        mine = batch[replica * share : (replica + 1) * share]
        refused, kept = [], []
        for fault in faults:
            is_guilty = replica == num_replicas - 1
            before = state_of(chunks, optimizer)
            rows = list(poisoned(mine)) if fault == POISONED and is_guilty else mine
            result = train_step(config, session, chunks, optimizer, rows, lr=1e-2)
            load.settle(not result.refused)
            refused.append(result.refused)
            kept.append(same(before, state_of(chunks, optimizer)))
            assert bool(result.bad_ranks) == (fault == POISONED), (fault, result.bad_ranks)
            assert math.isfinite(result.loss) == math.isfinite(result.grad_norm) == (fault == SOUND)
        return {
            "refused": refused,
            "kept": kept,
            "state": state_of(chunks, optimizer),
            "load": load.take(session.device),
        }


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_of_a_bad_step(case: str) -> None:
    world_size, sections = CASES[case]
    found = run_ranks(world_size, steps, sections, (SOUND, POISONED, SOUND))
    expected = run_ranks(world_size, steps, sections, (SOUND, SOUND))
    for with_fault, without in zip(found, expected, strict=True):
        assert with_fault["refused"] == ["", "loss and gradient norm not finite", ""]
        assert with_fault["kept"] == [False, True, False] and without["kept"] == [False, False]
        assert same(with_fault["state"], without["state"])
        assert torch.equal(with_fault["load"], without["load"])


def one_bad_weight(rank: int, world_size: int, sections: dict) -> list[str]:
    """What is said on the last rank, one of whose numbers is infinite, at each place where it may be."""
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        optimizer = build_optimizer(config, chunks, session)
        require_finite(chunks, optimizer, rank)
        if rank < world_size - 1:
            return []
        (part,) = optimizer.chained_optimizers
        parameter, updated = list(updated_parameters(part))[-1]
        said = []
        for tensor in {id(t): t for t in (parameter, updated, *part.optimizer.state[updated].values())}.values():
            with torch.no_grad():
                whole = tensor.clone()
                tensor.view(-1)[-1] = math.inf
                with pytest.raises(BadNumbers) as error:
                    require_finite(chunks, optimizer, rank)
                said.append(str(error.value))
                tensor.copy_(whole)
        require_finite(chunks, optimizer, rank)
        return said


def test_state_that_is_not_finite_is_named() -> None:
    whole = run_ranks(1, one_bad_weight, {"optimizer": {"distributed": False}})[0]
    assert [words.partition(" (")[0] for words in whole] == ["state of rank 0 is not finite"] * 3
    slices = run_ranks(2, one_bad_weight, BF16)[1]
    kinds = ["", "FP32 copy of ", "exp_avg of ", "exp_avg_sq of "]
    assert len(slices) == 4
    for words, kind in zip(slices, kinds, strict=True):
        assert words.startswith(f"state of rank 1 is not finite ({kind}") and words.count(",") == 0, words


def flipped(rank: int, world_size: int, sections: dict, guilty: int, part: str) -> str:
    """What is said after one bit of a weight changed on one rank, and then changed back."""
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        settled: list[str] = []
        watch = NumberWatch(config, session, chunks, TrainingState(step=2), lambda: settled.append("saves"))
        watch.compare_replicas()
        assert not settled
        held = [(name, p) for chunk in chunks for name, p in chunk.named_parameters() if part in name]
        weights = [p for _, p in held if getattr(p, "allreduce", True) == (session.groups.ep.size() == 1)]
        bits = weights[0].detach().view(torch.int16).view(-1)
        first, said = "", ""
        for is_first in (True, False):
            said = ""
            if rank == guilty:
                bits[-1] ^= 1 << 3
            try:
                watch.compare_replicas()
            except (BadNumbers, SystemExit) as error:
                said = str(error)
            first = said if is_first else first
        assert said == "" and settled == ["saves"]
        return first


@pytest.mark.parametrize(
    ("sections", "part", "told"),
    [
        ({}, "vision_encoder", "rank 2 differs from the others of ranks 0, 1, 2, 3"),
        ({"parallel": {"pp": 2}}, "decoder", "ranks 2, 3 differ of ranks 2, 3"),
        ({"parallel": {"pp": 2, "vpp": 2}}, "decoder.layers.", "decoder.layers.1."),
        (merge_sections(EXPERTS, {"parallel": {"ep": 2}}), "decoder", "ranks 0, 2 differ of ranks 0, 2"),
    ],
    ids=["data", "pipeline", "interleaved", "experts"],
)
def test_a_flipped_bit_names_tensor_and_rank(sections: dict, part: str, told: str) -> None:
    first, *others = run_ranks(4, flipped, merge_sections(BF16, sections), 2, part)
    assert told in first and part in first, first
    assert set(others) == {"5"}
