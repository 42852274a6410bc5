"""FP8 tensors by one scale (delayed or of the tensor itself) and by scales of 128-wide blocks.

The numbers of FP8 are kept as bytes. Products on Hopper take rows alone, so "columnwise" is the transpose, stored.
Memory that a kernel would leave unwritten holds NaN.
"""

import math
from collections.abc import Sequence
from math import ceil
from typing import Any

import torch

from tests.engine.standin.calls import exported
from tests.engine.standin.enums import torch_type

BLOCK = 128
_NOT_A_NUMBER = 0x7F
"""The byte that is NaN in both types of FP8."""


def _kind(quantizer: Any) -> str:
    return type(quantizer).__name__


def is_delayed(quantizer: Any) -> bool:
    """Scaled by what past steps saw."""
    return _kind(quantizer) == "Float8Quantizer"


def _is_per_tensor(quantizer: Any) -> bool:
    return _kind(quantizer) in ("Float8Quantizer", "Float8CurrentScalingQuantizer")


def turned(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the stored transpose."""
    return (shape[-1], *shape[:-1])


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [m, n], which an empty tensor leaves to its shape."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _bytes(shape: Sequence[int]) -> torch.Tensor:
    return torch.full(tuple(shape), _NOT_A_NUMBER, dtype=torch.uint8)


def _block_grid(shape: Sequence[int], quantizer: Any, columnwise: bool) -> tuple[int, int]:
    """The shape of the stored scales; for strips of 1 x 128 their transpose, as the product reads it."""
    rows, width = math.prod(shape[:-1]), shape[-1]
    if columnwise:
        rows, width = width, rows
    if quantizer.block_scaling_dim == 2:
        return ceil(rows / BLOCK), ceil(width / BLOCK / 4) * 4
    return ceil(width / BLOCK), ceil(rows / 4) * 4


def allocate(quantizer: Any, shape: Sequence[int], dtype: torch.dtype) -> Any:
    """A tensor of this shape that nobody wrote, of the class of the quantizer."""
    if _is_per_tensor(quantizer):
        from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor as whole
        from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage as storage

        fields = {
            "data": _bytes(shape) if quantizer.rowwise_usage else None,
            "data_transpose": _bytes(turned(shape)) if quantizer.columnwise_usage else None,
            "fp8_scale_inv": torch.full((1,), math.nan),
        }
    elif _kind(quantizer) == "Float8BlockQuantizer":
        from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor as whole
        from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
            Float8BlockwiseQTensorStorage as storage,
        )

        rowwise, columnwise = quantizer.rowwise_usage, quantizer.columnwise_usage
        fields = {
            "rowwise_data": _bytes(shape) if rowwise else None,
            "rowwise_scale_inv": torch.full(_block_grid(shape, quantizer, False), math.nan) if rowwise else None,
            "columnwise_data": _bytes(turned(shape)) if columnwise else None,
            "columnwise_scale_inv": torch.full(_block_grid(shape, quantizer, True), math.nan) if columnwise else None,
            "is_2D_scaled": quantizer.block_scaling_dim == 2,
        }
    else:
        raise NotImplementedError(f"a tensor quantized by {_kind(quantizer)}")
    fields |= {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if quantizer.internal:
        return storage(**fields, fake_dtype=dtype)
    return whole(shape=tuple(shape), dtype=dtype, device=torch.device("cpu"), **fields)


def _fit(output: Any, quantizer: Any) -> None:
    """Gives a tensor that is written again the buffers that its quantizer uses, and takes away the others."""
    empty = allocate(quantizer, tuple(output.size()), torch.bfloat16)
    buffers = (
        ("_data", "_transpose")
        if _is_per_tensor(quantizer)
        else ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv")
    )
    for name in buffers:
        wanted = getattr(empty, name)
        if wanted is None or getattr(output, name) is None:
            setattr(output, name, wanted)
    if _is_per_tensor(quantizer):
        output._transpose_invalid = not quantizer.columnwise_usage
    output._fp8_dtype = quantizer.dtype


def _scale(amax: torch.Tensor, fp8: torch.dtype, quantizer: Any) -> torch.Tensor:
    """What brings the largest value to the largest of the type; 1 for zeros and infinities."""
    amax = amax.clamp(min=quantizer.amax_epsilon)
    scale = (torch.finfo(fp8).max / amax).clamp(max=torch.finfo(torch.float32).max)
    scale = torch.where((amax == 0) | amax.isinf(), 1.0, scale)
    return torch.exp2(torch.floor(torch.log2(scale))) if quantizer.force_pow_2_scales else scale


def _cast(values: torch.Tensor, scale: torch.Tensor, fp8: torch.dtype) -> torch.Tensor:
    """Rounded to nearest and saturated, as bytes."""
    limit = torch.finfo(fp8).max
    return (values.float() * scale).clamp(-limit, limit).to(fp8).view(torch.uint8)


def _write_per_tensor(values: torch.Tensor, out: Any, quantizer: Any) -> None:
    if out._data is None:
        raise NotImplementedError("Columnwise-only per-tensor FP8 quantization is not implemented")
    fp8 = torch_type(quantizer.dtype)
    amax = values.abs().max().float().reshape(1)
    if is_delayed(quantizer):
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax.view_as(quantizer.amax)))
        scale = quantizer.scale.detach().reshape(1)
    else:
        if quantizer.with_amax_reduction:
            group = quantizer._canonicalized_amax_reduction_group()
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=group)
        scale = _scale(amax, fp8, quantizer)
    out._data.copy_(_cast(values, scale, fp8))
    out._scale_inv.copy_(1 / scale)
    if out._transpose is not None:
        out._transpose.copy_(flat(out._data).t().reshape(out._transpose.shape))


def _block_scales(matrix: torch.Tensor, fp8: torch.dtype, quantizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[m, n] -> the scale of each value, [m, n], and their inverses as they are stored, without padding."""
    rows, width = matrix.shape
    grid = (ceil(rows / BLOCK), ceil(width / BLOCK))
    padded = torch.zeros(grid[0] * BLOCK, grid[1] * BLOCK)
    padded[:rows, :width] = matrix.float().abs()
    blocks = padded.view(grid[0], BLOCK, grid[1], BLOCK)
    if quantizer.block_scaling_dim == 2:
        scale = _scale(blocks.amax((1, 3)), fp8, quantizer)
        return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :width], 1 / scale
    scale = _scale(blocks.amax(3).view(-1, grid[1])[:rows], fp8, quantizer)
    return scale.repeat_interleave(BLOCK, 1)[:, :width], (1 / scale).t()


def block_matrix(tensor: Any, columnwise: bool) -> torch.Tensor:
    """The values of the rows, or of the stored transpose, in FP32."""
    side = "columnwise" if columnwise else "rowwise"
    data, stored = getattr(tensor, f"_{side}_data"), getattr(tensor, f"_{side}_scale_inv")
    matrix = data.reshape(data.shape[0], -1) if columnwise else flat(data)
    rows, width = matrix.shape
    stored = stored.repeat_interleave(BLOCK, 0)[:rows] if tensor._is_2D_scaled else stored.t()[:rows]
    return matrix.view(torch_type(tensor._fp8_dtype)).float() * stored.repeat_interleave(BLOCK, 1)[:, :width]


def _write_blocks(values: torch.Tensor, out: Any, quantizer: Any) -> None:
    fp8 = torch_type(quantizer.dtype)
    matrix = flat(values)
    if matrix.shape[1] % 16:
        raise RuntimeError(f"blocks of FP8 take a last dimension that is a multiple of 16, found {tuple(values.shape)}")
    for side, rows in (("rowwise", matrix), ("columnwise", matrix.t())):
        data = getattr(out, f"_{side}_data")
        if data is not None:
            scale, inverse = _block_scales(rows, fp8, quantizer)
            data.copy_(_cast(rows, scale, fp8).reshape(data.shape))
            getattr(out, f"_{side}_scale_inv")[: inverse.shape[0], : inverse.shape[1]] = inverse


def quantized(tensor: torch.Tensor, quantizer: Any, output: Any = None) -> Any:
    """The tensor in FP8, into ``output`` where there is one; an empty tensor is left unwritten."""
    with torch.no_grad():
        values = tensor.detach()
        if output is None:
            output = allocate(quantizer, values.shape, values.dtype)
        else:
            _fit(output, quantizer)
        if values.numel():
            (_write_per_tensor if _is_per_tensor(quantizer) else _write_blocks)(values, output, quantizer)
    return output


@exported
def quantize(tensor, quantizer, output=None, noop=None):
    """A tensor in FP8."""
    if noop is not None and noop.item():
        return output
    return quantized(tensor, quantizer, output)


@exported
def dequantize(input, otype):
    """The values again."""
    dtype = torch_type(otype)
    if hasattr(input, "_is_2D_scaled"):
        if input._rowwise_data is None:
            matrix = block_matrix(input, columnwise=True).t()
            return matrix.reshape(*input._columnwise_data.shape[1:], -1).to(dtype)
        return block_matrix(input, columnwise=False).reshape(input._rowwise_data.shape).to(dtype)
    if input._data is None:
        raise RuntimeError("Cannot dequantize an FP8 tensor without its rows")
    return (input._data.view(torch_type(input._fp8_dtype)).float() * input._scale_inv).to(dtype)


@exported
def bgrad_quantize(input, quantizer):
    """[..., n] -> the sum over rows, [n], and the tensor in FP8."""
    total = flat(input).sum(0, dtype=torch.float32).to(input.dtype)
    return [total, input.contiguous() if quantizer is None else quantized(input, quantizer)]


@exported
def create_empty_quantized_tensor(quantizer, shape, dtype, device, pin_memory):
    """A tensor that nobody wrote."""
    return allocate(quantizer, shape, dtype)


@exported
def split_quantize(tensor, split_sections, quantizer_list, disable_bulk_allocation=False):
    """Rows in pieces, each in FP8 by its own quantizer."""
    if len(split_sections) != len(quantizer_list):
        raise RuntimeError(f"Expected {len(split_sections)} quantizers, but got {len(quantizer_list)}")
    pieces = tensor[: sum(split_sections)].split(list(split_sections))
    return [quantized(piece, quantizer) for piece, quantizer in zip(pieces, quantizer_list, strict=True)]


@exported
def multi_tensor_quantize(tensor_list, quantizer_list):
    """Each tensor in FP8 by its own quantizer."""
    return [quantized(tensor, quantizer) for tensor, quantizer in zip(tensor_list, quantizer_list, strict=True)]


@exported
def fp8_transpose(input, dtype, *, out):
    """Bytes of FP8 [..., n] -> their transpose [n, ...]."""
    result = _bytes(turned(input.shape)) if out is None else out
    if input.numel():
        result.copy_(flat(input).t().reshape(turned(input.shape)))
    return result


@exported
def compute_amax(input, amax):
    """The largest absolute value, into ``amax``."""
    amax.copy_(input.detach().abs().max().float().view_as(amax))


@exported
def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer, amax_histories, scales, amax_compute_algo, fp8_dtype, margin, /
):
    """Delayed scaling, once a pass: what was largest joins the histories [length, tensors] and gives new scales."""
    limit, start = torch.finfo(torch_type(fp8_dtype)).max, 0
    for history, scale in zip(amax_histories, scales, strict=True):
        width = history.shape[1]
        history[0].copy_(amax_reduction_buffer[start : start + width])
        start += width
        amax = history.amax(0) if amax_compute_algo == "max" else history[0].clone()
        history.copy_(history.roll(-1, 0))
        history[0].zero_()
        new = limit / amax / 2**margin
        new = new.clamp(max=torch.finfo(torch.float32).max)
        scale.copy_(torch.where((amax > 0) & amax.isfinite(), new, scale))


@exported
def swizzle_scales_for_gemm_(tensor, /):
    """Only MXFP8 and NVFP4 have scales to reorder."""


@exported
def swap_first_dims(tensor, *, out):
    """[a, b, ...] -> [b, a, ...]."""
    result = tensor.transpose(0, 1).contiguous()
    return result if out is None else out.copy_(result)
