"""Rotary position embeddings: one-dimensional for the decoder, two-dimensional for the visual encoder."""

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """Angles of 1D RoPE. positions [t] -> [t, dim / 2] float32, position * theta^(-2i/dim)."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim)
    return positions.to(torch.float32).unsqueeze(-1) * frequencies


def rotary_angles_2d(rows: Tensor, columns: Tensor, head_dim: int, theta: float) -> Tensor:
    """Angles of 2D RoPE: half of the frequencies turn with the row, half with the column (reference behaviour).

    Args:
        rows: [p] row of each patch inside its image and scale.
        columns: [p] column of each patch.
        head_dim: Channels of a head, a multiple of 4.
        theta: Base of the frequencies.

    Returns:
        [p, head_dim / 2] float32, the row's angles before the column's.
    """
    half = head_dim // 2
    return torch.cat([rotary_angles(rows, half, theta), rotary_angles(columns, half, theta)], dim=-1)


def cos_sin(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotate-half tables. angles [t, d / 2] -> [2, t, 1, d], cosines before sines."""
    doubled = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return torch.stack([doubled.cos(), doubled.sin()]).to(dtype)


def apply_rotary(heads: Tensor, rotary: Tensor) -> Tensor:
    """Turn pairs of channels (i, i + d/2). heads [t, n, d], rotary from ``cos_sin``."""
    cos, sin = rotary[0], rotary[1]
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin
