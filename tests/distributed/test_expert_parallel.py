"""One expert a rank: rows travel whatever the ranks hold, an expert without rows has a zero gradient, and checkpoints
are those of one rank. Whole steps are in test_layouts.py, checkpoints of every layout in test_checkpoint_layouts.py.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from navil_megatron.blueprint.modality_order import plan_modality_order
from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.config.run import NaViLConfig
from navil_megatron.kernels.torch_kernels import TORCH_KERNELS
from navil_megatron.layers.modality import NaViLPackedSeqParams, build_packed_seq_params
from navil_megatron.layers.modality_experts import ModalityExperts
from navil_megatron.layers.modality_mlp import ModalityMLP
from navil_megatron.models.build import build_model
from navil_megatron.models.mcore_config import build_transformer_config
from navil_megatron.models.sharded_weights import shard_weights
from navil_megatron.runtime.session import Session
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step
from tests.oracle import (
    IMAGE_ONLY,
    MIXED,
    TEXT_ONLY,
    TINY_IMAGE,
    Outcome,
    compare,
    global_batch,
    merge_sections,
    oracle_config,
    run_steps,
)
from tests.ranks import run_ranks, start_session
from tests.tolerances import RANKS
from tests.whole import assemble, load_whole, read_whole, slices_of

ROWS, HIDDEN, INNER = 12, 32, 48
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {"ep": 2}),
    "ep2-tp2-sp": (4, {"ep": 2, "tp": 2, "sequence_parallel": True}),
    "ep2-pp2": (4, {"ep": 2, "pp": 2}),
    "ep2-dp4": (4, {"ep": 2}),
}
COUNTS = ((5, 7), (0, 0), (ROWS, ROWS), (0, ROWS), (ROWS, 3), (1, 0))
FROZEN = (None, ".text.")
UNBALANCED: dict[str, dict[str, Any]] = {"training": {"global_batch_size": 2}, "optimizer": {"distributed": False}}


def _plan(num_text: int) -> NaViLPackedSeqParams:
    visual = np.arange(ROWS) >= num_text
    return build_packed_seq_params(plan_modality_order(visual, [ROWS]))


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"linear_fc1": (2 * INNER, HIDDEN), "linear_fc2": (HIDDEN, INNER)}
    return {
        f"decoder.layers.mlp.{layer}.{modality}.weight": torch.randn(1, *shape, generator=generator) / 8
        for layer, shape in shapes.items()
        for modality in ("text", "visual")
    }


class _InItsPlace(torch.nn.Module):
    """The only decoder layer of a model, without its attention: there the table of parameters knows the weights."""

    def __init__(self, feed_forward: torch.nn.Module, config: NaViLConfig, session: Session) -> None:
        super().__init__()
        self.config, self.session = config, session
        layer = torch.nn.Module()
        layer.mlp = feed_forward
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList([layer])

    def sharded_state_dict(self, metadata: dict) -> dict:
        """As the model's."""
        weights, groups = self.state_dict(keep_vars=True), self.session.groups
        return shard_weights(weights, self.config.model, groups, 0, self.session.groups.ep.size() > 1)


def _feed_forward(rank: int, world_size: int, parallel: dict) -> list:
    """For every case: outputs, input gradients and weight gradients of the feed-forward layer."""
    config = oracle_config(parallel=parallel, model={"language": {"num_layers": 1}})
    with start_session(rank, world_size, config) as session:
        kind = ModalityMLP if session.groups.ep.size() == 1 else ModalityExperts
        layer = kind(build_transformer_config(config), session.groups, TORCH_KERNELS)
        model = _InItsPlace(layer, config, session)
        load_whole([model], _weights())
        return [_case(model, layer, session, counts, frozen) for counts in COUNTS for frozen in FROZEN]


def _case(
    model: torch.nn.Module, layer: torch.nn.Module, session: Session, counts: tuple[int, ...], frozen: str | None
) -> tuple[list, list]:
    """Replica i has ``counts[i]`` text rows; a lone rank runs all replicas' rows in turn."""
    for name, parameter in layer.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(frozen is None or frozen not in name)
    seen = []
    for replica in range(len(counts)) if session.world_size == 1 else [session.groups.dp.rank()]:
        generator = torch.Generator().manual_seed(replica)
        whole = torch.randn(2, ROWS, 1, HIDDEN, generator=generator) / 4
        rows, weights = whole.chunk(session.groups.tp.size(), 1)[session.groups.tp.rank()]
        rows = rows.clone().requires_grad_()
        output = layer(rows, _plan(counts[replica]))
        (output * weights).sum().backward()
        seen.append((replica, session.groups.tp.rank(), output.detach(), rows.grad))
    assert all(parameter.grad is not None for parameter in layer.parameters() if parameter.requires_grad)
    return seen, slices_of([model], "grad")


@pytest.mark.parametrize("layout", ["ep2", "ep2-tp2-sp"])
def test_rows_of_any_mixture_equal_one_rank(layout: str) -> None:
    """Also where an expert has no row of one rank, or of any."""
    (one,) = run_ranks(1, _feed_forward, {})
    world_size, parallel = LAYOUTS[layout]
    for *of_ranks, (one_seen, one_gradients) in zip(*run_ranks(world_size, _feed_forward, parallel), one, strict=True):
        whole = assemble(one_gradients)
        compared = set()
        for seen, gradients in of_ranks:
            for replica, tp_rank, *tensors in seen:
                for found, expected in zip(tensors, one_seen[replica][2:], strict=True):
                    torch.testing.assert_close(found, expected.chunk(world_size // 2)[tp_rank], **RANKS)
            for key, _, index, values in gradients:
                torch.testing.assert_close(values, whole[key][index], **RANKS)
                compared.add(key)
        assert compared == set(whole)


@functools.cache
def _one_rank(batch: tuple) -> Outcome:
    (outcome,) = run_ranks(1, run_steps, UNBALANCED, batch)
    return outcome


@pytest.mark.parametrize(
    ("layout", "recompute"), [("ep2", "none"), ("ep2-tp2-sp", "full"), ("ep2-pp2", "selective"), ("ep2-pp2", "full")]
)
@pytest.mark.parametrize(
    "batch", [(TEXT_ONLY, TEXT_ONLY), (IMAGE_ONLY, IMAGE_ONLY), (TEXT_ONLY, IMAGE_ONLY), (TINY_IMAGE, TEXT_ONLY)]
)
def test_steps_on_unbalanced_ranks_equal_one_rank(batch: tuple, layout: str, recompute: str) -> None:
    """The first row goes to the first replica, the second to the second; without images the visual expert idles."""
    world_size, parallel = LAYOUTS[layout]
    sections = merge_sections(UNBALANCED, {"parallel": parallel, "training": {"recompute": recompute}})
    compare(run_ranks(world_size, run_steps, sections, batch), _one_rank(batch), **RANKS)


def _hold_one_expert(rank: int, world_size: int) -> tuple[set[str], list[int]]:
    config = oracle_config(parallel={"ep": 2}, training={"phase": "s1.1"})
    with start_session(rank, world_size, config) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        optimizer = build_optimizer(config, chunks, session)
        experts = {name.split(".")[-2] for name, _ in chunks[0].module.named_parameters() if ".mlp." in name}
        return experts, [sum(len(g["params"]) for g in part.param_groups) for part in optimizer.chained_optimizers]


def test_a_rank_holds_one_expert_and_a_frozen_one_has_an_empty_optimizer() -> None:
    """Core makes the expert optimizer on every rank, so the gradient norm is the same collectives everywhere."""
    (text, text_parts), (visual, visual_parts) = run_ranks(2, _hold_one_expert)
    assert (text, visual) == ({"text"}, {"visual"})
    assert text_parts[1] == 0 < visual_parts[1]


def _resave(rank: int, world_size: int, sections: dict, steps: int, number: int) -> None:
    """Restores what there is, goes some steps, saves."""
    config = oracle_config(**sections)
    with start_session(rank, world_size, config) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        optimizer = build_optimizer(config, chunks, session)
        manager = CheckpointManager(config, session)
        manager.restore_latest(chunks, optimizer)
        batch = global_batch(config, (MIXED, TEXT_ONLY, IMAGE_ONLY, TINY_IMAGE), session)
        share = len(batch) // session.groups.dp.size()
        for _ in range(steps):
            mine = batch[session.groups.dp.rank() * share : (session.groups.dp.rank() + 1) * share]
            train_step(config, session, chunks, optimizer, mine, lr=1e-2)
        manager.save(number, chunks, optimizer, {})


@pytest.mark.parametrize("hand_over", [("one", "ep2", "one"), ("ep2", "ep2-dp4", "one")])
@pytest.mark.parametrize(("distributed", "precision"), [(True, "fp32"), (False, "fp32"), (False, "bf16")])
def test_frozen_experts_leave_checkpoints_those_of_one_rank(
    distributed: bool, precision: str, hand_over: tuple[str, ...], tmp_path: Path
) -> None:
    """Trained at the first layout, then handed on: every tensor stays the same, master weights and moments included.

    In this phase the rank of the text expert has an expert optimizer without parameters.
    """
    sections = {
        "checkpoint": {"directory": str(tmp_path), "keep_last": 10},
        "optimizer": {"distributed": distributed},
        "training": {"phase": "s1.1"},
        "precision": {"type": precision},
    }
    saved = []
    for number, layout in enumerate(hand_over):
        world_size, parallel = LAYOUTS.get(layout, (1, {}))
        run_ranks(world_size, _resave, {**sections, "parallel": parallel}, 0 if number else 2, number)
        saved.append(read_whole(tmp_path / f"step_{number:08d}"))
    moment = "optimizer.state.exp_avg_sq.decoder.layers.mlp.linear_fc1.visual.weight"
    assert float(saved[0][moment].abs().max()) > 0
    assert not any("chained" in key for key in saved[0])
    for after in saved[1:]:
        assert sorted(after) == sorted(saved[0])
        torch.testing.assert_close(after, saved[0], rtol=0, atol=0)
