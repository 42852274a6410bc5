"""megatron-core comes without the compiler and without wandb, and its fusions compute all the same."""

import sys

import torch

from navil_megatron.runtime.core_import import compile_when_called
from tests.ranks import run_ranks, start_session

HEAVY = ("torch._inductor.compile_fx", "wandb")


def fusion_on_a_cpu(rank: int, world_size: int) -> tuple[list[str], float]:
    with start_session(rank, world_size):
        from megatron.core.fusions.fused_bias_swiglu import swiglu

        gate, up = torch.randn(3, 2, 4)[:2]
        distance = swiglu(torch.cat([gate, up], -1)) - torch.nn.functional.silu(gate) * up
    return [name for name in HEAVY if sys.modules.get(name)], float(distance.abs().max())


def test_a_rank_on_a_cpu_loads_no_compiler_and_computes_the_fusions() -> None:
    ((loaded, distance),) = run_ranks(1, fusion_on_a_cpu)
    assert loaded == []
    assert distance == 0


def test_a_fusion_is_compiled_once_by_its_first_call() -> None:
    asked = []

    def compile_now(function):
        asked.append(function)
        return torch.compile(function, backend="eager")

    def double(numbers: torch.Tensor, *, add: int = 0) -> torch.Tensor:
        return 2 * numbers + add

    deferred = compile_when_called(compile_now, double)
    assert asked == [] and deferred.__name__ == "double"
    assert [deferred(torch.ones(2), add=add).tolist() for add in (0, 1)] == [[2, 2], [3, 3]]
    assert asked == [double]


def test_what_core_was_imported_with_is_put_back() -> None:
    import navil_megatron.runtime  # noqa: F401

    assert torch.compile.__module__ == "torch"
    assert sys.modules.get("wandb", sys) is not None
