"""Triton's kernels on a GPU: the bodies that ``tests/unit/test_kernels_triton.py`` runs in its interpreter."""

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tokens", [300, 21, 1, 0])
@pytest.mark.parametrize(
    "name", ["grouped", "grouped, norms", "one group, norms", "no text, norms", "wide, norms", "encoder"]
)
def test_heads(name: str, tokens: int) -> None:
    from tests.triton_bodies import check_heads

    check_heads(name, tokens, "cuda")


def test_heads_in_place() -> None:
    from tests.triton_bodies import check_in_place

    check_in_place("cuda")


@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize("width", [12_288, 1100])
def test_swiglu(width: int, has_weights: bool) -> None:
    from tests.triton_bodies import check_swiglu

    check_swiglu(width, has_weights, "cuda")
