"""What Triton's kernels must give, on the device that is asked for; run by itself, in Triton's interpreter on a CPU."""

import os
import sys

import torch
from torch import Tensor

from navil_megatron.kernels.torch_kernels import TORCH_KERNELS
from navil_megatron.kernels.triton_kernels import with_triton
from navil_megatron.layers.swiglu import SwiGLU
from tests.tolerances import BF16_ONCE, RANKS, RANKS_ON_GPUS
from tools.bench import attention_heads as bench

CASES = {
    "grouped": bench.Case(8, 2, 16, norms=False),
    "grouped, norms": bench.Case(8, 2, 16, norms=True),
    "one group, norms": bench.Case(4, 1, 24, norms=True),
    "no text, norms": bench.Case(6, 2, 12, norms=True, text=0.0),
    "wide, norms": bench.Case(24, 4, 256, norms=True),
    "encoder": bench.Case(4, 4, 16, norms=False, is_encoder=True),
}
KERNELS = with_triton(TORCH_KERNELS)
TOLERANCE = {"cpu": RANKS, "cuda": RANKS_ON_GPUS}


def check_heads(name: str, tokens: int, device: str) -> None:
    """In float32 the same as torch's kernels, in bf16 the nearest to it."""
    rows = bench.given(CASES[name], tokens, torch.float32, torch.device(device))
    wanted = _wanted(bench.ours(rows))
    exact = _with_gradients(rows, TORCH_KERNELS, wanted)
    for found, expected in zip(_with_gradients(rows, KERNELS, wanted), exact, strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE[device])
    rounded = rows._replace(
        qkv=rows.qkv.detach().bfloat16().requires_grad_(),
        weights=None if rows.weights is None else rows.weights.detach().bfloat16().requires_grad_(),
    )
    again = rounded._replace(
        qkv=rounded.qkv.detach().float().requires_grad_(),
        weights=None if rounded.weights is None else rounded.weights.detach().float().requires_grad_(),
    )
    given = [part.bfloat16() for part in wanted]
    found = _with_gradients(rounded, KERNELS, given)
    for part, expected in zip(found, _with_gradients(again, TORCH_KERNELS, [g.float() for g in given]), strict=True):
        _assert_nearest(part, expected)


def check_in_place(device: str) -> None:
    """Rows that lie in attention order, and one norm for both modalities."""
    rows = bench.given(CASES["grouped, norms"], 24, torch.float32, torch.device(device))
    shared = rows.weights.detach()[:, :1].requires_grad_()
    wanted = _wanted(bench.ours(rows))
    both = []
    for kernels in (KERNELS, TORCH_KERNELS):
        outputs = bench.AttentionHeads.apply(
            rows.qkv, shared, None, bench.EPSILON, None, None, bench.cos_sin(rows.angles), rows.fused, kernels
        )
        both.append([*outputs, *torch.autograd.grad(outputs, [rows.qkv, shared], wanted)])
    for found, expected in zip(*both, strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE[device])


def check_swiglu(width: int, has_weights: bool, device: str) -> None:
    """With and without a weight for each row, with rows and without any."""
    generator = torch.Generator(device).manual_seed(0)
    for shape in ((3, 2), (0, 1)):
        gate_up = torch.randn(*shape, 2 * width, generator=generator, device=device)
        weights = torch.rand(shape, generator=generator, device=device) if has_weights else None
        wanted = torch.randn(*shape, width, generator=generator, device=device) / 16
        for dtype in (torch.float32, torch.bfloat16):
            given = [x.to(dtype).requires_grad_() for x in (gate_up, weights) if x is not None]
            exact = [x.detach().float().requires_grad_() for x in given]
            found = _swiglu(given, KERNELS, wanted.to(dtype))
            expected = _swiglu(exact, TORCH_KERNELS, wanted.to(dtype).float())
            for ours, theirs in zip(found, expected, strict=True):
                if dtype == torch.float32:
                    torch.testing.assert_close(ours, theirs, **TOLERANCE[device])
                else:
                    _assert_nearest(ours, theirs)


def _wanted(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the outputs, as small as gradients are beside the absolute part of a tolerance."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [torch.randn(part.shape, generator=generator, device=part.device) / 16 for part in outputs]


def _swiglu(given: list[Tensor], kernels: object, wanted: Tensor) -> list[Tensor]:
    output = SwiGLU.apply(given[0], given[1] if len(given) > 1 else None, kernels)
    return [output, *torch.autograd.grad(output, given, wanted)]


def _with_gradients(rows: bench.Given, kernels: object, wanted: list[Tensor]) -> list[Tensor]:
    outputs = bench.ours(rows, kernels)  # type: ignore[arg-type]
    assert all(part.is_contiguous() for part in outputs)
    return [*outputs, *torch.autograd.grad(outputs, rows.leaves(), wanted)]


def _assert_nearest(found: Tensor, exact: Tensor) -> None:
    """But for numbers whose float32 lies halfway. Triton's interpreter cuts off what a GPU rounds."""
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    if found.is_cuda and found.numel():
        assert (found == exact.bfloat16()).float().mean() > 0.98
    torch.testing.assert_close(found.float(), exact, **BF16_ONCE)


def main() -> None:
    """All of it on a CPU."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    for name in CASES:
        check_heads(name, 3, "cpu")
    # More rows than a program sums up, and none.
    for tokens in (18, 0):
        check_heads("grouped, norms", tokens, "cpu")
    check_in_place("cpu")
    for has_weights in (False, True):
        check_swiglu(1100, has_weights, "cpu")
    print(f"{len(CASES)} kinds of heads and SwiGLU are right")


if __name__ == "__main__":
    sys.exit(main())
