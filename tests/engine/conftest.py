"""Where a test of the engine runs: rehearsed on CPU ranks, or on GPUs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.engine.host import run_rehearsed
from tests.ranks import run_ranks


@dataclass(frozen=True)
class Place:
    """Ranks that have Transformer Engine."""

    device: str
    """``runtime.device`` of their runs."""

    def run(self, world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 180) -> list[Any]:
        """What ``fn(rank, world_size, *args)`` returns on each rank, in processes of their own."""
        if self.device == "cpu":
            return run_rehearsed(world_size, fn, *args, timeout=timeout)
        if torch.cuda.device_count() < world_size:
            pytest.skip(f"needs {world_size} GPUs")
        return run_ranks(world_size, fn, *args, timeout=timeout)


@pytest.fixture(scope="session", params=["rehearsed", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> Place:
    """Rehearsed in the default suite, on a GPU by ``make test-gpu``."""
    return Place("cpu" if request.param == "rehearsed" else "cuda")
