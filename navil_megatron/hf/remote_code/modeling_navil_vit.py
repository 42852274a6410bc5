"""NaViL's visual encoder: packed patches of any grid, 2D RoPE, LayerScale, no final norm.

Shapes: p patches of all images and scales end to end, w width, n heads, d channels of a head. Patches arrive in
2x2-merge-block order. With ``token_order`` "window" blocks are permuted window by window and never put back.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional

from .configuration_navil_chat import NaViLVisionConfig


@dataclass(frozen=True)
class PatchPlan:
    """What follows from the grids alone: the same in every layer."""

    angles: torch.Tensor
    """[p, d/2] rotary angles (row, column) in arrival order."""
    block_order: torch.Tensor
    """[p/4] arrival index of the merge block at each place of the encoder's order."""
    image_lengths: tuple[int, ...]
    """Patches of each image scale and frame, in the encoder's order."""
    window_lengths: tuple[int, ...]
    """Patches of each attention window, in the encoder's order."""


def plan_patches(grid_thw: list[list[int]], config: NaViLVisionConfig) -> PatchPlan:
    """Angles, order and attention segments of packed patches, on the host.

    Args:
        grid_thw: Frames, patch rows and patch columns of every scale image.
        config: The encoder's settings.

    Raises:
        ValueError: A grid does not divide into merge blocks.
    """
    merge = round(1 / config.downsample_ratio)
    half = config.hidden_size // config.num_attention_heads // 2
    frequencies = config.rope_theta ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
    angles, orders = [torch.empty(0, half)], [torch.empty(0, dtype=torch.long)]
    image_lengths: list[int] = []
    window_lengths: list[int] = []
    num_blocks = 0
    for frames, height, width in grid_thw:
        if height % merge or width % merge:
            raise ValueError(f"a grid of {height} x {width} patches does not divide into {merge} x {merge} blocks")
        rows, columns = height // merge, width // merge
        index = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)
        blocks = index.view(rows, merge, columns, merge, 2).transpose(1, 2).reshape(-1, 2, 1)
        angles.append((blocks * frequencies).flatten(1).repeat(frames, 1))
        order, windows = _window_order(frames, rows, columns, config.window_size // merge)
        if config.token_order == "raster":
            order = torch.arange(len(order))
        orders.append(order + num_blocks)
        image_lengths += [height * width] * frames
        window_lengths += [count * merge**2 for count in windows]
        num_blocks += len(order)
    return PatchPlan(torch.cat(angles), torch.cat(orders), tuple(image_lengths), tuple(window_lengths))


def _window_order(frames: int, rows: int, columns: int, side: int) -> tuple[torch.Tensor, list[int]]:
    """Merge blocks of one grid window by window, and how many each window holds; ragged at right and bottom."""
    row, column = torch.arange(rows) // side, torch.arange(columns) // side
    windows_across, windows_down = -(-columns // side), -(-rows // side)
    window = row[:, None] * windows_across + column
    window = torch.arange(frames)[:, None, None] * (windows_across * windows_down) + window
    return window.flatten().argsort(stable=True), window.flatten().bincount().tolist()


def group_segments(lengths: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Segments of equal length as one [segments, length] index each, so that attention runs once per length."""
    ends = list(accumulate(lengths))
    groups = []
    for length in sorted(set(lengths)):
        first = torch.tensor([end - length for end, size in zip(ends, lengths, strict=True) if size == length])
        groups.append((first[:, None] + torch.arange(length)).to(device))
    return tuple(groups)


class NaViLVisionRMSNorm(nn.Module):
    """RMSNorm that returns to the activations' type before it multiplies by the weight."""

    def __init__(self, size: int, eps: float) -> None:
        """Starts as the identity scale."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., w] -> [..., w]."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class NaViLVisionEmbeddings(nn.Module):
    """One linear map per patch, kept as the convolution whose key the authors' files hold."""

    def __init__(self, config: NaViLVisionConfig) -> None:
        """One kernel of patch size, with bias."""
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[p, 3, patch, patch] or [p, 3 * patch * patch] -> [p, w]."""
        weight = self.patch_embedding.weight.flatten(1)
        return functional.linear(pixel_values.flatten(1).to(weight.dtype), weight, self.patch_embedding.bias)


class NaViLVisionAttention(nn.Module):
    """Bidirectional multi-head attention inside segments."""

    def __init__(self, config: NaViLVisionConfig) -> None:
        """Rows of ``qkv`` are all heads of q, then of k, then of v."""
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, segments: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """[p, w] -> [p, w]; ``cos`` and ``sin`` are [p, 1, d]; ``segments`` comes from ``group_segments``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = torch.empty_like(v)
        for index in segments:
            attended = functional.scaled_dot_product_attention(
                q[index].transpose(1, 2), k[index].transpose(1, 2), v[index].transpose(1, 2)
            )
            mixed[index] = attended.transpose(1, 2)
        return self.proj(mixed.flatten(1))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate-half RoPE in float32."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class NaViLVisionMLP(nn.Module):
    """GELU feed-forward network."""

    def __init__(self, config: NaViLVisionConfig) -> None:
        """Both layers have a bias."""
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[p, w] -> [p, w]."""
        return self.fc2(functional.gelu(self.fc1(x)))


class NaViLVisionEncoderLayer(nn.Module):
    """Pre-norm layer whose two branches are scaled per channel (LayerScale)."""

    def __init__(self, config: NaViLVisionConfig) -> None:
        """Takes the norm kind from the config."""
        super().__init__()
        norms = {"rms_norm": NaViLVisionRMSNorm, "layer_norm": nn.LayerNorm}
        norm = norms[config.norm_type]
        self.attn = NaViLVisionAttention(config)
        self.mlp = NaViLVisionMLP(config)
        self.norm1 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(torch.full((config.hidden_size,), config.initializer_factor))
        self.ls2 = nn.Parameter(torch.full((config.hidden_size,), config.initializer_factor))

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, segments: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """[p, w] -> [p, w]."""
        x = x + self.attn(self.norm1(x), cos, sin, segments) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class NaViLVisionEncoder(nn.Module):
    """The layers; the authors' keys have this level."""

    def __init__(self, config: NaViLVisionConfig) -> None:
        """Any depth, 0 included."""
        super().__init__()
        self.layers = nn.ModuleList(NaViLVisionEncoderLayer(config) for _ in range(config.num_hidden_layers))


class NaViLVisionModelAnyRes(nn.Module):
    """Patches of any number of images and scales in, one vector per patch out."""

    gradient_checkpointing = False  # transformers sets it, and the function below, on every module that has it

    def __init__(self, config: NaViLVisionConfig) -> None:
        """Builds embedding and layers."""
        super().__init__()
        self.config = config
        self.embeddings = NaViLVisionEmbeddings(config)
        self.encoder = NaViLVisionEncoder(config)

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Encodes packed patches.

        Args:
            pixel_values: [p, 3, patch, patch] or [p, 3 * patch * patch], merge blocks one after the other.
            image_grid_thw: [num_scales, 3].

        Returns:
            [p, w]: four consecutive rows are one merge block, blocks in the order of ``token_order``.
        """
        grids = image_grid_thw.tolist()
        expected = sum(t * h * w for t, h, w in grids)
        if expected != pixel_values.shape[0]:
            raise ValueError(f"image_grid_thw promises {expected} patches, pixel_values holds {pixel_values.shape[0]}")
        x = self.embeddings(pixel_values)
        plan = plan_patches(grids, self.config)
        angles = plan.angles.to(x.device)
        if self.config.token_order == "window":
            order = plan.block_order.to(x.device)
            x, angles = (tensor.unflatten(0, (len(order), -1))[order].flatten(0, 1) for tensor in (x, angles))
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        cos, sin = angles.cos(), angles.sin()
        whole = group_segments(plan.image_lengths, x.device)
        full_layers = self.config.fullatt_block_indexes
        windows = whole if full_layers is None else group_segments(plan.window_lengths, x.device)
        for index, layer in enumerate(self.encoder.layers):
            full = full_layers is None or index in full_layers
            arguments = (x, cos, sin, whole if full else windows)
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, *arguments)
            else:
                x = layer(*arguments)
        return x
