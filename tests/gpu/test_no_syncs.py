"""A whole step makes the host wait for the GPU once, for loss and norm: at any other wait CUDA itself raises."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from navil_megatron.config.runtime import RuntimeConfig
from navil_megatron.models.build import build_model
from navil_megatron.runtime.session import Launch, Session
from navil_megatron.training import step
from navil_megatron.training.optimizer import build_optimizer, wrap_ddp
from navil_megatron.training.step import train_step
from tests.oracle import IMAGE_ONLY, MIXED, TEXT_ONLY, global_batch, oracle_config

EXPERTS = {"language": {"num_experts": 4, "experts_per_token": 2}}
CHOICES = {
    "none": {"recompute": "none"},
    "selective": {"recompute": "selective", "recompute_modules": ("attention", "mlp", "encoder")},
    "full": {"recompute": "full"},
}


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["", "experts"])
def test_step_waits_once(
    choice: str, experts: dict, overlap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = oracle_config(
        model={**experts, "vision": {"num_attention_heads": 3}},  # of 8 channels, which attention takes
        training=CHOICES[choice],
        precision={"type": "bf16"},
        optimizer={"overlap_grad_reduce": overlap, "overlap_param_gather": overlap},
        logging={"directory": str(tmp_path)},
    )
    config = dataclasses.replace(config, runtime=RuntimeConfig(device="cuda", collective_timeout_seconds=60))
    launch = Launch(rank=0, world_size=1, local_rank=0, local_world_size=1, rendezvous_file=tmp_path / "rendezvous")
    with Session.start(config, launch) as session:
        chunks = wrap_ddp(config, session, build_model(config, session.groups, session.device))
        optimizer = build_optimizer(config, chunks, session)
        batch = global_batch(config, (MIXED, TEXT_ONLY, IMAGE_ONLY), session)
        # The first step loads kernels and opens the communicator.
        train_step(config, session, chunks, optimizer, batch, lr=1e-3)
        read, num_reads = step._read_of_all_ranks, []

        def unwatched_read(*numbers: Any) -> Any:
            num_reads.append(1)
            torch.cuda.set_sync_debug_mode("default")
            try:
                return read(*numbers)
            finally:
                torch.cuda.set_sync_debug_mode("error")

        monkeypatch.setattr(step, "_read_of_all_ranks", unwatched_read)
        with waiting_is_an_error():
            result = train_step(config, session, chunks, optimizer, batch, lr=1e-3)
        assert not result.refused and len(num_reads) == 1
        assert float(result.loss_sum) > 0


@pytest.mark.gpu
def test_the_watch_sees_a_wait() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), waiting_is_an_error():
        torch.ones(1, device="cuda").item()
