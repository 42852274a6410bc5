"""Rotary embeddings: of [s, b, n, d], [b, s, n, d], or of packed segments [t, n, d] that each start at position 0."""

import torch

from tests.engine.standin.calls import exported
from tests.engine.standin.enums import NVTE_QKV_Format


def _positions(input, start_positions, qkv_format, cu_seqlens, cp_size):
    """The row of ``freqs`` for each token, shaped to meet the input's leading axes."""
    if start_positions is not None or cp_size != 1:
        raise NotImplementedError("rotary embeddings from other starts or of context-parallel ranks")
    if qkv_format == NVTE_QKV_Format.NVTE_THD:
        lengths = cu_seqlens.diff().tolist()
        return torch.cat([torch.arange(length) for length in lengths]) if lengths else torch.zeros(0, dtype=torch.long)
    positions = torch.arange(input.shape[0 if qkv_format == NVTE_QKV_Format.NVTE_SBHD else 1])
    return positions.unsqueeze(1 if qkv_format == NVTE_QKV_Format.NVTE_SBHD else 0)


def _swap(x, interleaved):
    """A quarter turn of every pair: the two halves, or neighbours."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _rotate(input, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, back):
    if freqs.dim() != 4 or freqs.shape[1:3] != (1, 1) or freqs.dtype != torch.float32:
        raise RuntimeError(f"frequencies [s, 1, 1, d] in FP32, found {freqs.dtype} {tuple(freqs.shape)}")
    width = freqs.shape[3]
    angles = freqs[_positions(input, start_positions, qkv_format, cu_seqlens, cp_size), 0, 0].unsqueeze(-2)
    turned, kept = input.detach().float().split([width, input.shape[-1] - width], -1)
    sin = angles.sin()
    across = -_swap(turned * sin, interleaved) if back else _swap(turned, interleaved) * sin
    return torch.cat([turned * angles.cos() + across, kept], -1).to(input.dtype)


@exported
def fused_rope_forward(input, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, /):
    """Turned by their positions' angles."""
    return _rotate(input, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, back=False)


@exported
def fused_rope_backward(output_grads, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, /):
    """Turned back."""
    return _rotate(output_grads, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, back=True)
