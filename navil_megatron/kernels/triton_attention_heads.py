"""Query, key and value out of the fused projection in one kernel each way: every number is read once and written once.

One program takes heads of a row of ``attention_heads.py``'s formulas. Sums of weight gradients are written by program
and added by torch, so that they are the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from navil_megatron.layers.kernels import FusedHeads, HeadNorms

NUMBERS = 1024
"""Half the numbers that a program holds of a tensor."""
ROWS = 16
"""Rows of a program that sums weight gradients."""


def attention_heads(
    qkv: Tensor, fused: FusedHeads, order: Tensor | None, rotary: Tensor, norms: HeadNorms | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``layers.kernels``."""
    weights, is_visual, epsilon = norms or (None, None, 0.0)
    return _forward(qkv, list(fused.sizes), fused.dim, order, rotary, weights, is_visual, epsilon)


def attention_heads_gradient(
    grads: tuple[Tensor, Tensor, Tensor],
    qkv: Tensor | None,
    fused: FusedHeads,
    inverse: Tensor | None,
    rotary: Tensor,
    norms: HeadNorms | None,
) -> tuple[Tensor, Tensor | None]:
    """See ``layers.kernels``."""
    weights, is_visual, epsilon = norms or (None, None, 0.0)
    found, of_weights = _backward(
        *grads, list(fused.sizes), fused.dim, qkv, inverse, rotary, weights, is_visual, epsilon
    )
    return found, None if weights is None else of_weights


@torch.library.custom_op("navil::attention_heads", mutates_args=())
def _forward(
    qkv: Tensor,
    sizes: list[int],
    dim: int,
    order: Tensor | None,
    rotary: Tensor,
    weights: Tensor | None,
    is_visual: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _empty_heads(qkv, sizes, dim)
    num_heads, num_groups, head_dim = outputs[0].shape[1], outputs[1].shape[1], qkv.shape[-1]
    half, block = _block(num_heads + 2 * num_groups, head_dim)
    _forward_kernel[(len(qkv), triton.cdiv(num_heads + 2 * num_groups, block))](
        qkv.contiguous(),
        order,
        rotary.contiguous(),
        None if weights is None else weights.contiguous(),
        is_visual,
        *outputs,
        num_heads,
        num_groups,
        epsilon,
        dim,
        head_dim,
        half,
        block,
    )
    return outputs


@_forward.register_fake
def _(qkv: Tensor, sizes: list[int], dim: int, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_heads(qkv, sizes, dim)


def _empty_heads(qkv: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, Tensor, Tensor]:
    others, head_dim = qkv.shape[3 - dim], qkv.shape[-1]
    query, key, value = (qkv.new_empty(len(qkv), size * others, head_dim) for size in sizes)
    return query, key, value


@torch.library.custom_op("navil::attention_heads_gradient", mutates_args=())
def _backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    sizes: list[int],
    dim: int,
    qkv: Tensor | None,
    inverse: Tensor | None,
    rotary: Tensor,
    weights: Tensor | None,
    is_visual: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    num_rows, num_heads, head_dim = grad_query.shape
    num_groups = grad_key.shape[1]
    half, block = _block(num_heads + 2 * num_groups, head_dim)
    rows = 1 if weights is None else ROWS
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(num_heads + 2 * num_groups, block))
    grad_qkv = _empty_fused(grad_query, sizes, dim)
    sums = None if weights is None else weights.new_empty(*grid, *weights.shape, dtype=torch.float32)
    _backward_kernel[grid](
        grad_query.contiguous(),
        grad_key.contiguous(),
        grad_value.contiguous(),
        None if weights is None or qkv is None else qkv.contiguous(),
        inverse,
        rotary.contiguous(),
        None if weights is None else weights.contiguous(),
        is_visual,
        grad_qkv,
        sums,
        num_rows,
        num_heads,
        num_groups,
        epsilon,
        dim,
        head_dim,
        half,
        block,
        rows,
    )
    if weights is None or sums is None:
        return grad_qkv, rotary.new_empty(0)
    return grad_qkv, sums.sum((0, 1)).to(weights.dtype)


@_backward.register_fake
def _(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    sizes: list[int],
    dim: int,
    qkv: Tensor | None,
    inverse: Tensor | None,
    rotary: Tensor,
    weights: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor]:
    of_weights = rotary.new_empty(0) if weights is None else torch.empty_like(weights)
    return _empty_fused(grad_query, sizes, dim), of_weights


def _empty_fused(query: Tensor, sizes: list[int], dim: int) -> Tensor:
    num_rows, num_heads, head_dim = query.shape
    shape = [num_rows, num_heads // sizes[0], num_heads // sizes[0], head_dim]
    shape[dim] = sum(sizes)
    return query.new_empty(shape)


def _block(num_heads: int, head_dim: int) -> tuple[int, int]:
    """Half of a head's channels and heads of a program, both rounded up to powers of two."""
    half = triton.next_power_of_2(head_dim // 2)
    return half, min(triton.next_power_of_2(num_heads), max(NUMBERS // half, 1))


@triton.jit
def _place(slots, num_heads, num_groups, DIM: tl.constexpr):
    """Of heads in the order of a fused row: query, key or value (0, 1, 2), and which head of it."""
    if DIM == 1:
        return slots // num_heads, slots % num_heads
    per_group = num_heads // num_groups
    group = slots // (per_group + 2)
    place = slots % (per_group + 2)
    part = tl.maximum(place - per_group + 1, 0)
    return part, tl.where(part == 0, group * per_group + place, group)


@triton.jit
def _forward_kernel(
    qkv,
    order,
    rotary,
    weights,
    is_visual,
    query,
    key,
    value,
    num_heads,
    num_groups,
    epsilon,
    DIM: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part, head = _place(slots, num_heads, num_groups, DIM)
    channels = tl.arange(0, HALF)[None, :]
    mask = (slots < num_heads + 2 * num_groups)[:, None] & (channels < D // 2)
    source = row if order is None else tl.load(order + row)
    numbers = qkv + ((source * (num_heads + 2 * num_groups) + slots) * D)[:, None] + channels
    first = tl.load(numbers, mask, 0.0).to(tl.float32)
    second = tl.load(numbers + D // 2, mask, 0.0).to(tl.float32)
    is_turned = (part < 2)[:, None]
    if weights is not None:
        inverse_root = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + epsilon)[:, None]
        if is_visual is None:
            scales = weights + (part * D)[:, None] + channels
        else:
            scales = weights + ((part * 2 + tl.load(is_visual + row).to(tl.int32)) * D)[:, None] + channels
        first = tl.where(is_turned, first * inverse_root * tl.load(scales, mask & is_turned, 0.0).to(tl.float32), first)
        second_scale = tl.load(scales + D // 2, mask & is_turned, 0.0).to(tl.float32)
        second = tl.where(is_turned, second * inverse_root * second_scale, second)
    cos = tl.load(rotary + row * D + channels, channels < D // 2, 0.0)
    sin = tl.load(rotary + row * D + D // 2 + channels, channels < D // 2, 0.0)
    turned_first = tl.where(is_turned, first * cos - second * sin, first)
    turned_second = tl.where(is_turned, second * cos + first * sin, second)
    of_query = query + ((row * num_heads + head) * D)[:, None] + channels
    of_key = key + ((row * num_groups + head) * D)[:, None] + channels
    of_value = value + ((row * num_groups + head) * D)[:, None] + channels
    tl.store(of_query, turned_first, mask & (part == 0)[:, None])
    tl.store(of_query + D // 2, turned_second, mask & (part == 0)[:, None])
    tl.store(of_key, turned_first, mask & (part == 1)[:, None])
    tl.store(of_key + D // 2, turned_second, mask & (part == 1)[:, None])
    tl.store(of_value, turned_first, mask & (part == 2)[:, None])
    tl.store(of_value + D // 2, turned_second, mask & (part == 2)[:, None])


@triton.jit
def _backward_kernel(
    grad_query,
    grad_key,
    grad_value,
    qkv,
    inverse,
    rotary,
    weights,
    is_visual,
    grad_qkv,
    sums,
    num_rows,
    num_heads,
    num_groups,
    epsilon,
    DIM: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    slots = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part, head = _place(slots, num_heads, num_groups, DIM)
    channels = tl.arange(0, HALF)[None, :]
    is_head = (slots < num_heads + 2 * num_groups)[:, None] & (channels < D // 2)
    is_turned = (part < 2)[:, None]
    # Of both halves: the sums of query and key, of text (or all) and of visual rows.
    query_first = tl.zeros((2, HALF), tl.float32)
    query_second = tl.zeros((2, HALF), tl.float32)
    key_first = tl.zeros((2, HALF), tl.float32)
    key_second = tl.zeros((2, HALF), tl.float32)
    modality = tl.arange(0, 2)[:, None]
    for number in range(ROWS):
        source = tl.program_id(0).to(tl.int64) * ROWS + number
        is_row = source < num_rows
        mask = is_head & is_row
        row = source if inverse is None else tl.load(inverse + source, is_row, 0)
        of_query = grad_query + ((row * num_heads + head) * D)[:, None] + channels
        of_key = grad_key + ((row * num_groups + head) * D)[:, None] + channels
        of_value = grad_value + ((row * num_groups + head) * D)[:, None] + channels
        first = tl.load(of_query, mask & (part == 0)[:, None], 0.0).to(tl.float32)
        first += tl.load(of_key, mask & (part == 1)[:, None], 0.0).to(tl.float32)
        first += tl.load(of_value, mask & (part == 2)[:, None], 0.0).to(tl.float32)
        second = tl.load(of_query + D // 2, mask & (part == 0)[:, None], 0.0).to(tl.float32)
        second += tl.load(of_key + D // 2, mask & (part == 1)[:, None], 0.0).to(tl.float32)
        second += tl.load(of_value + D // 2, mask & (part == 2)[:, None], 0.0).to(tl.float32)
        cos = tl.load(rotary + row * D + channels, (channels < D // 2) & is_row, 0.0)
        sin = tl.load(rotary + row * D + D // 2 + channels, (channels < D // 2) & is_row, 0.0)
        turned_first = tl.where(is_turned, first * cos + second * sin, first)
        turned_second = tl.where(is_turned, second * cos - first * sin, second)
        place = ((source * (num_heads + 2 * num_groups) + slots) * D)[:, None] + channels
        if weights is not None:
            normed_first = tl.load(qkv + place, mask & is_turned, 0.0).to(tl.float32)
            normed_second = tl.load(qkv + place + D // 2, mask & is_turned, 0.0).to(tl.float32)
            squares = tl.sum(normed_first * normed_first, 1) + tl.sum(normed_second * normed_second, 1)
            inverse_root = tl.rsqrt(squares / D + epsilon)[:, None]
            normed_first *= inverse_root
            normed_second *= inverse_root
            if is_visual is None:
                visual = 0
                scales = weights + (part * D)[:, None] + channels
            else:
                visual = tl.load(is_visual + row, is_row, 0).to(tl.int32)
                scales = weights + ((part * 2 + visual) * D)[:, None] + channels
            product_first = turned_first * normed_first
            product_second = turned_second * normed_second
            is_mine = (modality == visual).to(tl.float32)
            query_first += tl.sum(tl.where((part == 0)[:, None], product_first, 0.0), 0)[None, :] * is_mine
            query_second += tl.sum(tl.where((part == 0)[:, None], product_second, 0.0), 0)[None, :] * is_mine
            key_first += tl.sum(tl.where((part == 1)[:, None], product_first, 0.0), 0)[None, :] * is_mine
            key_second += tl.sum(tl.where((part == 1)[:, None], product_second, 0.0), 0)[None, :] * is_mine
            scale_first = tl.load(scales, mask & is_turned, 0.0).to(tl.float32)
            scale_second = tl.load(scales + D // 2, mask & is_turned, 0.0).to(tl.float32)
            mean = (tl.sum(product_first * scale_first, 1) + tl.sum(product_second * scale_second, 1))[:, None] / D
            scaled_first = (turned_first * scale_first - normed_first * mean) * inverse_root
            scaled_second = (turned_second * scale_second - normed_second * mean) * inverse_root
            turned_first = tl.where(is_turned, scaled_first, turned_first)
            turned_second = tl.where(is_turned, scaled_second, turned_second)
        tl.store(grad_qkv + place, turned_first, mask)
        tl.store(grad_qkv + place + D // 2, turned_second, mask)
    if weights is not None:
        modalities = 1 if is_visual is None else 2
        program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
        mine = sums + (program * 2 * modalities + modality) * D + channels
        is_kept = (modality < modalities) & (channels < D // 2)
        tl.store(mine, query_first, is_kept)
        tl.store(mine + D // 2, query_second, is_kept)
        tl.store(mine + modalities * D, key_first, is_kept)
        tl.store(mine + modalities * D + D // 2, key_second, is_kept)
