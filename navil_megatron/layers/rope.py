"""Rotary position embeddings: one-dimensional for the decoder, two-dimensional for the visual encoder."""

import math

import torch
from torch import Tensor

from navil_megatron.config.language import LanguageConfig


def decoder_angles(positions: Tensor, language: LanguageConfig) -> Tensor:
    """Angles of the decoder's RoPE. positions [t] -> [t, head_dim / 2] float32."""
    frequencies = rotary_frequencies(language.head_dim, language.rope_theta, positions.device)
    if language.rope_scaling_factor is not None:
        frequencies = scale_slow_frequencies(
            frequencies,
            language.rope_scaling_factor,
            language.rope_low_freq_factor,
            language.rope_high_freq_factor,
            language.rope_original_length,
        )
    return rotary_angles(positions, frequencies)


def rotary_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/dim) radians a position, [dim / 2] float32."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def scale_slow_frequencies(
    frequencies: Tensor, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: int
) -> Tensor:
    """Llama 3.1's scaling for longer rows: slow frequencies are divided by ``factor``, fast ones stay.

    A frequency is slow below ``low_freq_factor`` turns over ``original_length`` tokens and fast from
    ``high_freq_factor`` on; between them the two are mixed linearly in the turns.
    """
    turns = frequencies * (original_length / (2 * math.pi))
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rotary_angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Angles of 1D RoPE. positions [t], frequencies [d / 2] -> [t, d / 2] float32."""
    return positions.to(torch.float32).unsqueeze(-1) * frequencies


def rotary_angles_2d(rows: Tensor, columns: Tensor, head_dim: int, theta: float) -> Tensor:
    """Angles of 2D RoPE: half of the frequencies turn with the row, half with the column (reference behaviour).

    Rows and columns of patches [p] inside their image and scale -> [p, head_dim / 2] float32, the row's angles first.
    """
    frequencies = rotary_frequencies(head_dim // 2, theta, rows.device)
    return torch.cat([rotary_angles(rows, frequencies), rotary_angles(columns, frequencies)], dim=-1)


def cos_sin(angles: Tensor) -> Tensor:
    """Rotate-half tables. angles [t, d / 2] -> [t, 2, d / 2] float32, cosines before sines."""
    return torch.stack([angles.cos(), angles.sin()], dim=1)
