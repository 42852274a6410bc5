"""Matrix products by cuBLAS's rules on Hopper: FP8 reads rows of both sides alone, and leading dimensions by 16."""

from typing import Any

import torch

from tests.engine.standin.calls import exported
from tests.engine.standin.enums import torch_type
from tests.engine.standin.quantize import block_matrix, flat, quantized

FP8_LEADING = 16
_BLOCK_OUTER = 8


def _is_fp8(operand: Any) -> bool:
    return hasattr(operand, "_fp8_dtype")


def _shape(operand: Any) -> tuple[int, ...]:
    return tuple(operand.size())


def _as_multiplied(operand: Any, columnwise: bool) -> torch.Tensor:
    """[m, k] in FP32: what is stored row by row, or the transpose of it."""
    if not _is_fp8(operand):
        matrix = flat(operand.detach()).float()
        return matrix.t() if columnwise else matrix
    if hasattr(operand, "_is_2D_scaled"):
        data = operand._columnwise_data if columnwise else operand._rowwise_data
    else:
        data = (None if operand._transpose_invalid else operand._transpose) if columnwise else operand._data
    if data is None:
        raise RuntimeError(f"FP8 product needs the {'transpose' if columnwise else 'rows'}, which nobody stored")
    matrix = data.reshape(data.shape[0], -1) if columnwise else flat(data)
    if matrix.shape[1] % FP8_LEADING:
        raise RuntimeError(
            f"Leading dimension requirement on an FP8 product's {tuple(matrix.shape)}: a multiple of {FP8_LEADING}. "
            "Caller must pad."
        )
    if hasattr(operand, "_is_2D_scaled"):
        return block_matrix(operand, columnwise)
    return matrix.view(torch_type(operand._fp8_dtype)).float() * operand._scale_inv


def _check_pair(a: Any, b: Any, left: torch.Tensor, right: torch.Tensor) -> None:
    """What the two sides of a product must have in common. ``left`` [m, k] is of ``b``, ``right`` [n, k] of ``a``."""
    if _is_fp8(a) != _is_fp8(b):
        raise RuntimeError("one side of a product is FP8, the other is not")
    if not _is_fp8(a):
        if a.dtype != b.dtype:
            raise RuntimeError(f"a product of {a.dtype} and {b.dtype}")
        return
    blocks = [hasattr(side, "_is_2D_scaled") for side in (a, b)]
    if blocks[0] != blocks[1]:
        raise RuntimeError("one side of an FP8 product is scaled by blocks, the other is not")
    if not blocks[0]:
        return
    if a._is_2D_scaled and b._is_2D_scaled:
        raise RuntimeError("Only 1D by 1D, 1D by 2D, and 2D by 1D block scaling supported for FP8 products")
    if right.shape[0] % _BLOCK_OUTER or (not b._is_2D_scaled and left.shape[0] % _BLOCK_OUTER):
        raise RuntimeError(
            f"Outer dimension requirement on an FP8 product of blocks: multiples of {_BLOCK_OUTER}, found "
            f"{left.shape[0]} x {right.shape[0]}"
        )


def _product(a: Any, trans_a: bool, b: Any, trans_b: bool) -> torch.Tensor:
    """``op(B) op(A)`` in FP32, [m, n]; of an empty side all zeros."""
    left = _as_multiplied(b, columnwise=trans_b)
    right = _as_multiplied(a, columnwise=not trans_a)
    if left.shape[1] != right.shape[1]:
        raise RuntimeError(
            f"Invalid matrix dimensions for GEMM (A={_shape(a)}, transa={trans_a}, B={_shape(b)}, transb={trans_b})"
        )
    if left.numel() == 0 or right.numel() == 0:
        return torch.zeros(left.shape[0], right.shape[0])
    _check_pair(a, b, left, right)
    return left @ right.t()


@exported
def generic_gemm(
    A,
    transA,
    B,
    transB,
    D,
    quantizer,
    output_dtype,
    bias,
    bias_type,
    gelu,
    gelu_in,
    grad,
    workspace,
    workspace_size,
    accumulate,
    use_split_accumulator,
    comm_overlap=None,
    comm_type=None,
    extra_output=None,
    bulk_overlap=False,
    alpha=1.0,
    beta=None,
):
    """``D = alpha op(B) op(A) + bias``, or added to ``D``; under ``grad`` the bias is summed from ``B``'s rows."""
    if gelu or comm_overlap is not None:
        raise NotImplementedError("generic_gemm with a GELU or with communication")
    if not accumulate and beta:
        raise RuntimeError("Trying to use non-zero beta while not accumulating into D tensor")
    empty = 0 in (*_shape(A), *_shape(B))
    result = alpha * _product(A, transA, B, transB)
    if output_dtype is None and _is_fp8(A):
        raise RuntimeError("an FP8 product needs the type of its output")
    dtype = A.dtype if output_dtype is None else torch_type(output_dtype)
    bias_grad = None
    if bias is not None and grad:
        if _is_fp8(B):
            raise RuntimeError("an FP8 product sums no bias gradient")
        bias_grad = flat(B).sum(0, dtype=torch.float32).to(dtype)
    elif bias is not None:
        if bias.dtype not in ((torch.bfloat16, torch.float16) if _is_fp8(A) else (dtype,)):
            raise RuntimeError(f"a bias of {bias.dtype} on a product into {dtype}")
        if not empty:
            result = result + bias.detach().float()
    if D is None:
        out = result.to(dtype)
        if not transB:
            out = out.reshape(*_shape(B)[:-1], result.shape[1])
    else:
        expected = (result.shape[0],) if transB else _shape(B)[:-1]
        if tuple(D.shape) != (*expected, result.shape[1]):
            raise RuntimeError(f"GEMM output has invalid dims (expected {(*expected, result.shape[1])}, got {D.shape})")
        if output_dtype is not None and D.dtype != dtype:
            raise RuntimeError(f"GEMM output has invalid dtype (expected {dtype}, found {D.dtype})")
        out = _store(result.view(D.shape), D, accumulate, 1.0 if beta is None else beta)
    if quantizer is not None:
        out = quantized(out, quantizer)
    return [out, bias_grad, None, extra_output]


def _store(result: torch.Tensor, out: torch.Tensor, accumulate: bool, beta: float = 1.0) -> torch.Tensor:
    out.copy_(result + beta * out.float() if accumulate else result)
    return out


@exported
def te_general_grouped_gemm(
    A,
    transa,
    B,
    transb,
    D,
    D_type,
    m_splits,
    bias,
    bias_type,
    single_output,
    pre_gelu_out,
    grad,
    workspace,
    workspaceSize,
    accumulate,
    use_split_accumulator,
    math_sm_count,
    /,
):
    """A product for each pair, into rows of one output or into an output each. An empty bias is none."""
    if single_output and D is None:
        raise RuntimeError("not implemented, D should be allocated for single output case.")
    if any(part.numel() for part in pre_gelu_out):
        raise NotImplementedError("te_general_grouped_gemm with a GELU")
    dtype, start = torch_type(D_type), 0
    for number, (a, b) in enumerate(zip(A, B, strict=True)):
        result = _product(a, transa, b, transb)
        empty = 0 in (*_shape(a), *_shape(b))
        if single_output:
            out = D[0][start : start + result.shape[0]]
            start += result.shape[0]
        else:
            out = D[number]
        if out.dtype != dtype or out.numel() != result.numel():
            raise RuntimeError(f"grouped GEMM {tuple(result.shape)} into {out.dtype} {tuple(out.shape)}")
        if bias[number].numel():
            if grad:
                if _is_fp8(b):
                    raise RuntimeError("an FP8 product sums no bias gradient")
                bias[number].copy_(flat(b).sum(0, dtype=torch.float32))
            elif not empty:
                result = result + bias[number].detach().float()
        if not (empty and accumulate):
            _store(result.view(out.shape), out, accumulate)
    return bias


@exported
def get_grouped_gemm_setup_workspace_size(num_tensors, /):
    """Bytes."""
    return 1024 * num_tensors


@exported
def get_num_cublas_streams():
    """Products of a group that run at once."""
    return 4
