"""From the fused projection to the softmax in one step: against each operation alone, and how many bytes both write."""

import pytest
import torch

from navil_megatron.kernels.torch_kernels import TORCH_KERNELS
from navil_megatron.layers.attention_heads import AttentionHeads
from tests.tolerances import RANKS
from tools.bench import attention_heads as bench

CASES = {
    "grouped": bench.Case(8, 2, 16, norms=False),
    "grouped, norms": bench.Case(8, 2, 16, norms=True),
    "one group, norms": bench.Case(4, 1, 16, norms=True),
    "no text, norms": bench.Case(4, 2, 16, norms=True, text=0.0),
    "no image, norms": bench.Case(4, 2, 16, norms=True, text=1.0),
    "encoder": bench.Case(4, 4, 16, norms=False, is_encoder=True),
}
CPU = torch.device("cpu")


def gradients(outputs: tuple[torch.Tensor, ...], rows: bench.Given) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    # As small as gradients are, beside the absolute part of a tolerance.
    wanted = [torch.randn(part.shape, generator=generator, dtype=part.dtype) / 16 for part in outputs]
    return torch.autograd.grad(outputs, rows.leaves(), wanted)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [24, 1, 0])
def test_equals_each_operation_alone(name: str, tokens: int) -> None:
    rows = bench.given(CASES[name], tokens, torch.float32, CPU)
    found, expected = bench.ours(rows), bench.one_by_one(rows)
    for ours, theirs in zip((*found, *gradients(found, rows)), (*expected, *gradients(expected, rows)), strict=True):
        torch.testing.assert_close(ours, theirs, **RANKS)
    assert all(part.is_contiguous() for part in found)


def test_a_modality_without_tokens_has_a_zero_gradient() -> None:
    rows = bench.given(CASES["no text, norms"], 24, torch.float32, CPU)
    _, weights = gradients(bench.ours(rows), rows)
    assert not weights[:, 0].any()
    assert weights[:, 1].all()


def test_rows_in_place_and_one_norm_for_both_modalities() -> None:
    rows = bench.given(CASES["grouped, norms"], 24, torch.float32, CPU)
    in_place = torch.arange(24)
    one = rows._replace(order=in_place, inverse=in_place, num_text=24)
    outputs = bench.one_by_one(one)
    of_rows, of_weights = gradients(outputs, one)
    shared = rows.weights[:, :1].detach().requires_grad_()
    found = AttentionHeads.apply(
        rows.qkv, shared, None, bench.EPSILON, None, None, bench.cos_sin(rows.angles), rows.fused, TORCH_KERNELS
    )
    again = gradients(found, rows._replace(weights=shared))
    for ours, theirs in zip((*found, *again), (*outputs, of_rows, of_weights[:, :1]), strict=True):
        torch.testing.assert_close(ours, theirs, **RANKS)


def test_rounds_bf16_once() -> None:
    """Each number is the nearest to that of float32, where each operation alone rounds after itself."""
    rows = bench.given(CASES["grouped, norms"], 64, torch.bfloat16, CPU)
    exact = rows._replace(qkv=rows.qkv.detach().float(), weights=rows.weights.detach().float())
    for ours, theirs, wanted in zip(bench.ours(rows), bench.one_by_one(rows), bench.one_by_one(exact), strict=True):
        nearest = wanted.to(torch.bfloat16)
        assert (ours == nearest).float().mean() > 0.99
        assert (ours - nearest).float().norm() <= (theirs - nearest).float().norm()


@pytest.mark.parametrize("name", ["grouped", "grouped, norms", "encoder"])
def test_operators_write_less(name: str) -> None:
    """Also where none is fused: to attention order and back the fused rows travel once."""
    found = bench.compare(CASES[name], tokens=256, rounds=1, dtype=torch.float32, device=CPU)
    assert found["ours_written"] < 0.8 * found["theirs_written"]
    assert found["ours_reordered"] < 2.2 * found["qkv"]  # the rotary table is a tenth
