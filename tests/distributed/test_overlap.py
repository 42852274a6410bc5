"""Overlapped communication changes when gradients and weights travel, and nothing else."""

import functools
import warnings
from typing import Any

import pytest
import torch

from navil_megatron.models.build import build_model
from navil_megatron.training.evaluate import evaluate
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.overlap import gather_parameters
from navil_megatron.training.step import train_step
from tests.distributed.test_layouts import BATCH
from tests.oracle import global_batch, global_loss, merge_sections, oracle_config
from tests.ranks import run_ranks, start_session
from tests.tolerances import RANKS

BUCKET = 2_000
"""Parameters; some twenty buckets, so that weights of a module arrive on their own."""
GRADIENTS = {"optimizer": {"overlap_grad_reduce": True}}
BOTH = {"optimizer": {"overlap_grad_reduce": True, "overlap_param_gather": True}}
EXPERTS = {"model": {"language": {"num_experts": 4, "experts_per_token": 2}}}
LAYOUTS: dict[str, tuple[int, dict]] = {
    "dp2": (2, {}),
    "dp2-recompute": (2, {"training": {"recompute": "full"}}),
    "dp2-tied": (2, {"model": {"language": {"tied_embeddings": True}}}),
    "dp2-s1.1": (2, {"training": {"phase": "s1.1"}}),
    "dp2-experts": (2, EXPERTS),
    "ep2": (2, {"parallel": {"ep": 2}}),
    "ep2-experts": (2, {"parallel": {"ep": 2}, **EXPERTS}),
    "cp2": (2, {"parallel": {"cp": 2}}),
    "dp2-tp2-sp": (4, {"parallel": {"tp": 2, "sequence_parallel": True}}),
    "dp2-pp2": (4, {"parallel": {"pp": 2}}),
    "dp2-pp2-interleaved": (4, {"parallel": {"pp": 2, "vpp": 2}}),
}
Found = dict[str, Any]


def three_steps(rank: int, world_size: int, sections: dict, num_steps: int = 3) -> Found:
    """Losses, norms, held-out loss right after an update, and what a save after the last step would read."""
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        model = build_model(config, session.groups, session.device)
        chunks = wrap_ddp(config, session, model, bucket_size=BUCKET)
        optimizer = build_optimizer(config, chunks, session)
        batch = global_batch(config, BATCH, session)
        share = len(batch) // session.groups.dp.size()
        mine = batch[session.groups.dp.rank() * share : (session.groups.dp.rank() + 1) * share]
        found: Found = {"losses": [], "norms": [], "held_out": [], "out_of_order": 0}
        for step in range(num_steps):
            with warnings.catch_warnings(record=True) as told:
                warnings.filterwarnings("always", "The next bucket's parameter all-gather operation has already been")
                result = train_step(config, session, chunks, optimizer, mine, lr=1e-2)
            found["out_of_order"] += sum("all-gather operation" in str(warning.message) for warning in told)
            found["losses"].append(global_loss(result, session))
            found["norms"].append(float(result.grad_norm))
            if step == 1:
                found["held_out"].append(evaluate(config, session, chunks, mine))
        gather_parameters(chunks)
        found["weights"] = [
            (name, weight.detach().clone()) for chunk in model for name, weight in chunk.named_parameters()
        ]
        found["buckets"] = sum(len(c.bucket_groups) for c in chunks)
        return found


@functools.cache
def without_overlap(layout: str) -> list[Found]:
    world_size, sections = LAYOUTS[layout]
    return run_ranks(world_size, three_steps, sections)


@pytest.mark.parametrize(
    ("layout", "overlap"),
    [*((layout, BOTH) for layout in LAYOUTS), ("dp2", GRADIENTS), ("dp2-pp2", GRADIENTS)],
    ids=[*LAYOUTS, "dp2-gradients-alone", "dp2-pp2-gradients-alone"],
)
def test_overlap_equals_none(layout: str, overlap: dict) -> None:
    world_size, sections = LAYOUTS[layout]
    found = run_ranks(world_size, three_steps, merge_sections(sections, overlap))
    assert found[0]["buckets"] > 5
    assert not any(rank["out_of_order"] for rank in found), "weights are needed in another order than they are gathered"
    for rank, (here, expected) in enumerate(zip(found, without_overlap(layout), strict=True)):
        for name in ("losses", "norms", "held_out"):
            torch.testing.assert_close(here[name], expected[name], **RANKS)
        for (name, weight), (_, wanted) in zip(here["weights"], expected["weights"], strict=True):
            torch.testing.assert_close(weight, wanted, **RANKS, msg=lambda m, r=rank, n=name: f"rank {r}, {n}: {m}")


def starts_in_backward(rank: int, world_size: int, sections: dict) -> list[tuple[int, int]]:
    """For each step: sums of gradients that were under way when the backward passes were over, and all of them."""
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device), bucket_size=BUCKET)
        optimizer = build_optimizer(config, chunks, session)
        found: list[tuple[int, int]] = []
        for chunk in chunks:
            chunk.finish_grad_sync = functools.partial(_under_way, found, chunk, chunk.finish_grad_sync)
        for _ in range(2):
            train_step(
                config,
                session,
                chunks,
                optimizer,
                global_batch(config, BATCH, session)[2 * rank : 2 * rank + 2],
                lr=0.0,
            )
        return found


def _under_way(found: list[tuple[int, int]], chunk: Any, finish: Any, **options: Any) -> None:
    groups = chunk.bucket_groups + chunk.expert_parallel_bucket_groups
    found.append((sum(group.grad_reduce_handle is not None for group in groups), len(groups)))
    finish(**options)


@pytest.mark.parametrize("sections", [{}, {"parallel": {"ep": 2}}, EXPERTS], ids=["dp2", "ep2", "dp2-experts"])
def test_every_sum_is_under_way_when_the_backward_pass_ends(sections: dict) -> None:
    """From the second step on: in the first core learns in which order gradients come."""
    for first, second in run_ranks(2, starts_in_backward, merge_sections(sections, GRADIENTS)):
        assert first[0] == 0
        assert second[0] == second[1] > 5


def stale_weights(rank: int, world_size: int) -> tuple[int, int]:
    """Weights that differ between two replicas before and after they are asked for."""
    config = oracle_config(**BOTH)
    with start_session(rank, world_size, config) as session:
        model = build_model(config, session.groups, session.device)
        chunks = wrap_ddp(config, session, model, bucket_size=BUCKET)
        optimizer = build_optimizer(config, chunks, session)
        train_step(
            config, session, chunks, optimizer, global_batch(config, BATCH, session)[2 * rank : 2 * rank + 2], lr=1e-2
        )
        before = _num_different(model)
        gather_parameters(chunks)
        return before, _num_different(model)


def _num_different(model: list) -> int:
    different = 0
    for weight in (weight.detach() for chunk in model for weight in chunk.parameters()):
        both = [torch.empty_like(weight) for _ in range(2)]
        torch.distributed.all_gather(both, weight)
        different += not torch.equal(*both)
    return different


def test_a_save_right_after_a_step_would_read_old_weights_unless_they_are_gathered() -> None:
    for before, after in run_ranks(2, stale_weights):
        assert before > 0
        assert after == 0
