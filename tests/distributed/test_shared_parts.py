"""Parts of a layer without modality experts: the model whose experts are equal, trained as one."""

from pathlib import Path

import pytest
import torch

from navil_megatron.blueprint.held_parameters import chunk_parameters
from navil_megatron.checkpoint.manager import CheckpointManager
from navil_megatron.models.build import build_model
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step
from tests.distributed.test_layouts import BATCH
from tests.oracle import Outcome, global_batch, global_loss, oracle_config
from tests.ranks import run_ranks, start_session
from tests.tolerances import RANKS
from tests.whole import assemble, read_whole, slices_of

ATTENTION = (".linear_qkv.", ".linear_proj.", "_layernorm.")
FEED_FORWARD = (".linear_fc1.", ".linear_fc2.")
SHARED = {(): (*ATTENTION, *FEED_FORWARD), ("ffn",): ATTENTION, ("attention",): FEED_FORWARD}
"""Parts with experts -> what the names of the shared weights hold."""


def step_from(rank: int, world_size: int, experts: tuple[str, ...], start: str | None, folder: str) -> Outcome:
    """One step; weights before it and after it are saved."""
    config = oracle_config(
        model={"language": {"modality_experts": experts}}, optimizer={"distributed": False, "clip_grad": None}
    )
    with start_session(rank, world_size, config) as session:
        model = build_model(config, session.groups, session.device)
        if start is None:
            equal_experts(model[0])
        manager = CheckpointManager(config, session)
        manager.directory = Path(folder)
        chunks = wrap_ddp(config, session, model)
        optimizer = build_optimizer(config, chunks, session)
        if start is not None:
            manager.directory = Path(start)
            manager.restore_latest(model, optimizer)
        manager.directory = Path(folder)
        manager.save(0, model, optimizer, {})
        result = train_step(config, session, chunks, optimizer, global_batch(config, BATCH, session), lr=1e-2)
        manager.save(1, model, optimizer, {})
        return Outcome(
            [global_loss(result, session)],
            [float(result.grad_norm)],
            slices_of(model, "main_grad"),
            [(name, parameter.numel()) for name, parameter in model[0].named_parameters()],
        )


@torch.no_grad()
def equal_experts(model: torch.nn.Module) -> None:
    """Every visual expert becomes a copy of the text one."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".visual." in name:
            parameter.copy_(parameters[name.replace(".visual.", ".text.")])


@pytest.mark.parametrize("experts", SHARED, ids=lambda parts: "+".join(parts) or "none")
def test_gradients_are_the_sums_over_equal_experts(experts: tuple[str, ...], tmp_path: Path) -> None:
    (separate,) = run_ranks(1, step_from, ("attention", "ffn"), None, str(tmp_path / "separate"))
    (shared,) = run_ranks(1, step_from, experts, None, str(tmp_path / "shared"))
    torch.testing.assert_close(shared.losses, separate.losses, **RANKS)
    expected, found = assemble(separate.gradients), assemble(shared.gradients)
    for key in list(expected):
        if ".visual." in key and any(part in key for part in SHARED[experts]):
            expected[key.replace(".visual.", ".text.")] += expected.pop(key)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], **RANKS, msg=key)


@pytest.mark.parametrize("experts", SHARED, ids=lambda parts: "+".join(parts) or "none")
def test_checkpoints_hold_them_for_both_modalities_and_restore_them(experts: tuple[str, ...], tmp_path: Path) -> None:
    (first,) = run_ranks(1, step_from, experts, None, str(tmp_path / "first"))
    stored = read_whole(tmp_path / "first" / "step_00000001")
    twins = [key for key in stored if ".visual." in key and any(part in key for part in SHARED[experts])]
    weights = [key for key in twins if not key.startswith("optimizer.")]
    assert weights
    for key in weights:
        assert torch.equal(stored[key], stored[key.replace(".visual.", ".text.")]), key
    run_ranks(1, step_from, experts, str(tmp_path / "first"), str(tmp_path / "second"))
    again = read_whole(tmp_path / "second" / "step_00000000")
    assert again.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in again.items())
    config = oracle_config(model={"language": {"modality_experts": experts}})
    planned = [(piece.name, piece.numel) for piece in chunk_parameters(config.model, config.parallel, 0)]
    assert first.parameters == planned
