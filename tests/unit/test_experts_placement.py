"""Where the experts of both modalities live, and how even that is."""

import pytest

from navil_megatron.blueprint.experts_placement import loads_of_ranks, local_experts
from navil_megatron.config.modality import MODALITIES


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(1, 1), (1, 2), (4, 1), (4, 2), (4, 4), (4, 8), (3, 2), (6, 4)])
def test_every_expert_lives_on_one_rank(num_experts: int, num_ranks: int) -> None:
    held = [local_experts(rank, num_ranks, num_experts) for rank in range(num_ranks)]
    assert {sum(map(len, experts.values())) for experts in held} == {2 * num_experts // num_ranks}
    for modality in MODALITIES:
        numbers = [number for experts in held for number in experts.get(modality, ())]
        assert numbers == list(range(num_experts))
    if num_experts % num_ranks == 0:
        assert all(len(experts["text"]) == len(experts["visual"]) for experts in held)


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "loads"),
    [(1, 2, (1.0, 1.3, 1.6)), (4, 1, (1.0,) * 3), (4, 2, (1.0,) * 3), (4, 4, (1.0,) * 3), (4, 8, (1.0, 1.3, 1.6))],
)
def test_loads_are_those_of_the_docs(num_experts: int, num_ranks: int, loads: tuple[float, ...]) -> None:
    """The table of docs/parallelism.md."""
    assert [max(loads_of_ranks(share, num_ranks, num_experts)) for share in (0.5, 0.65, 0.8)] == pytest.approx(loads)
