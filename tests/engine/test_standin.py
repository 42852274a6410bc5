"""The stand-in against plain torch, and what it refuses as a Hopper would."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.engine.host import run_rehearsed
from tests.engine.runs import distance
from tests.tolerances import FP8_ROUNDING

ROWS, WIDTH, OUT = 256, 384, 128


def recipes() -> dict[str, Any]:
    from transformer_engine.common import recipe

    return {
        "delayed": recipe.DelayedScaling(amax_history_len=2),
        "tensorwise": recipe.Float8CurrentScaling(),
        "blockwise": recipe.Float8BlockScaling(),
    }


def draw(*shape: int) -> torch.Tensor:
    """Values whose sizes differ by row and column, as scales of blocks and of tensors see them."""
    values = torch.randn(*shape) * torch.linspace(0.5, 2, shape[-1]) * torch.linspace(1, 3, shape[0]).unsqueeze(-1)
    return values.bfloat16()


def products(rank: int, world_size: int) -> dict[str, float]:
    """Distance from FP32 of a linear's output and three gradients in every recipe."""
    import transformer_engine.pytorch as te

    found = {}
    for name, recipe in recipes().items():
        torch.manual_seed(1)
        linear = te.Linear(WIDTH, OUT, params_dtype=torch.bfloat16, device="cpu")
        inputs, grad = draw(ROWS, WIDTH), draw(ROWS, OUT)
        # The second pass is the first with scales of its own under delayed scaling.
        for _ in range(2):
            linear.zero_grad()
            x = inputs.clone().requires_grad_()
            with te.autocast(enabled=True, recipe=recipe):
                out = linear(x)
            out.backward(grad)
        exact = [t.detach().float().requires_grad_() for t in (inputs, linear.weight, linear.bias)]
        expected = F.linear(*exact)
        expected.backward(grad.float())
        ours = (out, x.grad, linear.weight.grad, linear.bias.grad)
        theirs = (expected, *(t.grad for t in exact))
        for part, a, b in zip(("out", "input", "weight", "bias"), ours, theirs, strict=True):
            found[f"{name} {part}"] = distance(a.detach().float(), b.detach())
    return found


def test_products_of_every_recipe_are_those_of_fp32_but_for_rounding() -> None:
    (found,) = run_rehearsed(1, products)
    assert {name: value for name, value in found.items() if not value <= FP8_ROUNDING} == {}
    # They were quantized, and the bias gradient is a sum of what was not.
    assert all(value > FP8_ROUNDING / 10 for name, value in found.items() if not name.endswith("bias"))


def refusals(rank: int, world_size: int) -> dict[str, str]:
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex

    formats, layouts, masks = tex.NVTE_QKV_Format, tex.NVTE_QKV_Layout, tex.NVTE_Mask_Type
    quantizer = te.Float8CurrentScalingQuantizer(te.DType.kFloat8E4M3, "cpu")
    quantizer.internal = True
    square, narrow = (quantizer(torch.randn(size, size)) for size in (32, 8))
    rows_alone = quantizer(torch.randn(32, 32))
    rows_alone._transpose_invalid = True
    workspace = torch.empty(0)

    def product(a: Any, b: Any, **how: bool) -> Callable[[], Any]:
        turned = {"transA": True, "transB": False, **how}
        dtype = te.DType.kBFloat16
        return lambda: tex.generic_gemm(
            A=a, B=b, **turned, D=None, quantizer=None, output_dtype=dtype, bias=None, bias_type=dtype, gelu=False,
            gelu_in=None, grad=False, workspace=workspace, workspace_size=0, accumulate=False,
            use_split_accumulator=False,
        )  # fmt: skip

    def attend(bounds: list[int], longest: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], Any]:
        q = torch.randn(8, 2, 16, dtype=dtype)
        cu = torch.tensor(bounds, dtype=torch.int32)
        return lambda: tex.fused_attn_fwd(
            longest, longest, True, 1.0, 0.0, True, layouts.NVTE_THD_THD_THD, formats.NVTE_THD,
            formats.NVTE_QKV_Format_NOT_SET, tex.NVTE_Bias_Type.NVTE_NO_BIAS, masks.NVTE_PADDING_CAUSAL_MASK,
            tex.NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX, (-1, 0), False, cu, cu, q, q, q, dtype, None, None, None, None,
            None, None, None, None, None, 0, False, False,
        )  # fmt: skip

    columns = te.Float8CurrentScalingQuantizer(te.DType.kFloat8E4M3, "cpu", rowwise=False)
    attempts: dict[str, Callable[[], Any]] = {
        "unwritten": lambda: tex.multi_tensor_sgd(),
        "no rows": lambda: tex.rmsnorm_fwd(torch.zeros(0, 8), torch.ones(8), 1e-6, None, None, 4, 0, False),
        "leading": product(narrow, narrow),
        "no transpose": product(rows_alone, square, transA=False),
        "one side": product(square, torch.randn(32, 32)),
        "types": product(torch.randn(32, 32), torch.randn(32, 32).bfloat16()),
        "shapes": product(torch.randn(32, 16), torch.randn(32, 32)),
        "columns": lambda: columns(torch.randn(32, 32)),
        "unknown quantizer": lambda: tex.quantize(torch.randn(32, 32), te.MXFP8Quantizer(te.DType.kFloat8E4M3)),
        "bounds": attend([0, 4, 7], 8),
        "longest": attend([0, 2, 8], 5),
        "float": attend([0, 8], 8, torch.float32),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (RuntimeError, NotImplementedError) as error:
            found[name] = str(error)
    product(square, square)()
    attend([0, 2, 8], 6)()
    return found


def test_refusals() -> None:
    expected = {
        "unwritten": "transformer_engine_torch.multi_tensor_sgd has no stand-in",
        "no rows": "Output rsigma is not allocated!",
        "leading": "Leading dimension requirement",
        "no transpose": "FP8 product needs the transpose",
        "one side": "one side of a product is FP8",
        "types": "a product of torch.float32 and torch.bfloat16",
        "shapes": "Invalid matrix dimensions",
        "columns": "Columnwise-only per-tensor FP8",
        "unknown quantizer": "quantized by MXFP8Quantizer",
        "bounds": "cu_seqlens [0, 4, 7] do not bound 8 rows",
        "longest": "a segment of 6 rows, but max_seqlen is 5",
        "float": "BF16 or FP16",
    }
    (found,) = run_rehearsed(1, refusals)
    assert found.keys() == expected.keys()
    assert [name for name, text in expected.items() if text not in found[name]] == []


def grouped(rank: int, world_size: int) -> dict[str, float]:
    """Distances of ``te.GroupedLinear`` from a ``te.Linear`` a piece, one of them without rows."""
    import transformer_engine.pytorch as te

    found = {}
    splits = [128, 0, 256]
    for name, recipe in {"bf16": None, **recipes()}.items():
        torch.manual_seed(2)
        whole = te.GroupedLinear(len(splits), WIDTH, OUT, params_dtype=torch.bfloat16, device="cpu")
        parts = [te.Linear(WIDTH, OUT, params_dtype=torch.bfloat16, device="cpu") for _ in splits]
        with torch.no_grad():
            for number, part in enumerate(parts):
                part.weight.copy_(getattr(whole, f"weight{number}"))
                part.bias.copy_(getattr(whole, f"bias{number}"))
        inputs, grad = draw(sum(splits), WIDTH), draw(sum(splits), OUT)
        x, y = (inputs.clone().requires_grad_() for _ in range(2))
        with te.autocast(enabled=recipe is not None, recipe=recipe):
            out = whole(x, splits)
            expected = torch.cat([part(rows) for part, rows in zip(parts, y.split(splits), strict=True)])
        out.backward(grad)
        expected.backward(grad)
        pairs = {"out": (out, expected), "input": (x.grad, y.grad)}
        for number, part in enumerate(parts):
            pairs[f"weight {number}"] = (getattr(whole, f"weight{number}").grad, part.weight.grad)
            pairs[f"bias {number}"] = (getattr(whole, f"bias{number}").grad, part.bias.grad)
        for what, (a, b) in pairs.items():
            found[f"{name} {what}"] = distance(a.detach().float(), b.detach().float())
    return found


def test_grouped_products_are_those_of_their_parts() -> None:
    (found,) = run_rehearsed(1, grouped)
    assert len(found) == 4 * 8
    assert {name: value for name, value in found.items() if value != 0} == {}


def rotated(rank: int, world_size: int) -> list[float]:
    """Distances of the fused rotary embedding from the unfused one, forward and backward, of each layout."""
    from transformer_engine.pytorch.attention.rope import RotaryPositionEmbedding, apply_rotary_pos_emb

    freqs = RotaryPositionEmbedding(16)(12)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    found = []
    for shape, layout in (((12, 2, 3, 24), "sbhd"), ((2, 12, 3, 24), "bshd"), ((12, 3, 24), "thd")):
        for interleaved in (False, True):
            values, grad = torch.randn(shape), torch.randn(shape)
            sides = []
            for fused in (True, False):
                x = values.clone().requires_grad_()
                more = {"tensor_format": layout, "interleaved": interleaved, "cu_seqlens": bounds}
                y = apply_rotary_pos_emb(x, freqs, fused=fused, **more)
                y.backward(grad)
                sides.append((y.detach(), x.grad))
            found += [distance(a, b) for a, b in zip(*sides, strict=True)]
    return found


def test_rotary_embeddings_fused_and_not() -> None:
    (found,) = run_rehearsed(1, rotated)
    assert len(found) == 12
    assert max(found) <= 1e-6


def kept_calls(rank: int, world_size: int) -> tuple[dict, int, Any]:
    import transformer_engine.pytorch as te

    from tests.engine.standin import calls

    linear = te.Linear(16, 32, bias=False, params_dtype=torch.bfloat16, device="cpu")
    calls.CALLS.clear()
    linear(torch.ones(4, 16, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    forward = calls.CALLS[0]
    return (
        dict(calls.count()),
        forward.num_bytes - forward.arguments["workspace"].num_bytes,
        forward.arguments["B"].dims,
    )


def test_calls_are_kept() -> None:
    (found,) = run_rehearsed(1, kept_calls)
    assert found == ({"generic_gemm": 3}, 2 * (16 * 32 + 4 * 16 + 4 * 32), (4, 16))


@pytest.mark.parametrize("rows", [(128, 0), (0, 0)])
def test_padding_there_and_back(rows: tuple[int, int]) -> None:
    from tests.engine.standin.padding import fused_multi_row_padding, fused_multi_row_unpadding

    given = torch.randn(sum(rows) - 3 * bool(rows[0]), 4)
    lengths = [given.shape[0], 0]
    padded = torch.full((sum(rows), 4), torch.nan)
    fused_multi_row_padding(given, padded, lengths, list(rows))
    back = torch.full_like(given, torch.nan)
    fused_multi_row_unpadding(padded, back, list(rows), lengths)
    assert torch.equal(back, given)
    assert not padded[given.shape[0] :].any()
