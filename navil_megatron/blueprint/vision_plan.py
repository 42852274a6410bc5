"""Host-side plan of the visual encoder's work: which rank encodes which scale-image, in which order, and how the
features come back into the row.

Each of the ranks that share a row takes whole scale-images, balanced by cost, because 23 heads do not split and because
images are independent. Patch order inside an image, 2D positions and windows follow the reference encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from navil_megatron.blueprint.flops import encoding_cost
from navil_megatron.blueprint.image_plan import Grid, num_patches
from navil_megatron.blueprint.segments import SegmentOrder
from navil_megatron.config.vision import VisionConfig


@dataclass(frozen=True, slots=True)
class VisionPlan:
    """One rank's share of a microbatch's images. p patches, m merged tokens of all ranks together."""

    is_mine: np.ndarray
    """[num_scales] bool: the scale-images that this rank encodes, and whose pixels it therefore needs."""
    cost: int
    """``encoding_cost`` of these."""
    patch_index: np.ndarray
    """[p] these images' patches, which lie in order of appearance, in encoder order."""
    rows: np.ndarray
    """[p] patch row inside its image and scale."""
    columns: np.ndarray
    """[p] patch column."""
    images: SegmentOrder
    """Patches of each (scale-image, frame), in encoder order, shortest first."""
    windows: SegmentOrder
    """Patches that attend to one another in most layers: of each window, or of whole images where all layers do."""
    gathered_tokens: int
    """Merged tokens that every rank contributes to the gather: the largest share."""
    feature_index: np.ndarray
    """[m] for each image token of the row, its place among the gathered features of all ranks; the model takes those of
    the tokens that it holds."""


def assign_images(costs: Sequence[int], num_ranks: int) -> list[int]:
    """Rank of each image: the costliest first, each to the least loaded rank. Deterministic."""
    loads = [0] * num_ranks
    ranks = [0] * len(costs)
    for image in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        ranks[image] = min(range(num_ranks), key=lambda rank: (loads[rank], rank))
        loads[ranks[image]] += costs[image]
    return ranks


@cache
def fullest_share(grids: tuple[Grid, ...], config: VisionConfig, num_ranks: int) -> tuple[Grid, ...]:
    """The scale-images of the rank that encodes most patches, of so many that share a row."""
    shares: list[list[Grid]] = [[] for _ in range(num_ranks)]
    owners = assign_images([encoding_cost(grid, config) for grid in grids], num_ranks)
    for grid, owner in zip(grids, owners, strict=True):
        shares[owner].append(grid)
    return tuple(max(shares, key=num_patches))


def plan_vision(grids: Sequence[Grid], config: VisionConfig, rank: int, num_ranks: int) -> VisionPlan:
    """Plan one rank's share of a microbatch's scale-images, given in order of appearance in the row.

    ``rank`` counts the ranks that share a row: context-parallel rank by rank, its tensor-parallel ranks.
    """
    merge = config.merge_size
    costs = [encoding_cost(grid, config) for grid in grids]
    owner = assign_images(costs, num_ranks)
    is_mine = np.array(owner, dtype=np.int64) == rank
    tokens_per_image = [t * h * w // merge**2 for t, h, w in grids]
    patches_at_hand = [t * h * w if mine else 0 for (t, h, w), mine in zip(grids, is_mine, strict=True)]
    first_patch = np.cumsum([0, *patches_at_hand])
    shortest_first = sorted(range(len(grids)), key=lambda i: grids[i][1] * grids[i][2])
    orders = [[i for i in shortest_first if owner[i] == r] for r in range(num_ranks)]
    gathered_tokens = max((sum(tokens_per_image[i] for i in order) for order in orders), default=0)

    place = np.zeros(len(grids), dtype=np.int64)
    for r, order in enumerate(orders):
        counts = [tokens_per_image[i] for i in order]
        place[order] = r * gathered_tokens + np.cumsum([0, *counts])[: len(order)]
    feature_index = [place[i] + np.arange(count) for i, count in enumerate(tokens_per_image)]

    patches: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    windows: list[int] = []
    images: list[int] = []
    for i in orders[rank]:
        frames, height, width = grids[i]
        blocks, window_tokens = block_order(height // merge, width // merge, config)
        block_rows, block_columns = np.divmod(blocks, width // merge)
        inside = np.arange(merge)
        for frame in range(frames):
            start = first_patch[i] + frame * height * width
            patches.append((start + blocks[:, None] * merge**2 + np.arange(merge**2)).ravel())
            rows.append((block_rows[:, None] * merge + np.repeat(inside, merge)).ravel())
            columns.append((block_columns[:, None] * merge + np.tile(inside, merge)).ravel())
            windows.extend(count * merge**2 for count in window_tokens)
            images.append(height * width)
    whole = SegmentOrder.of(images)
    return VisionPlan(
        is_mine=is_mine,
        cost=sum(cost for cost, mine in zip(costs, is_mine, strict=True) if mine),
        patch_index=_concatenate(patches),
        rows=_concatenate(rows),
        columns=_concatenate(columns),
        images=whole,
        windows=whole if config.full_attention_layers is None else SegmentOrder.of(windows),
        gathered_tokens=gathered_tokens,
        feature_index=_concatenate(feature_index),
    )


def block_order(num_rows: int, num_columns: int, config: VisionConfig) -> tuple[np.ndarray, list[int]]:
    """Order of one frame's merge blocks in the encoder and in the row, and the blocks of each attention window.

    ``raster`` keeps reading order. ``window`` goes window by window, both in reading order, ragged at the right and
    bottom edge; the reference encoder never undoes it.
    """
    blocks = np.arange(num_rows * num_columns).reshape(num_rows, num_columns)
    if config.token_order == "raster":
        return blocks.ravel(), [blocks.size]
    side = config.window_size // config.merge_size
    windows = [
        blocks[top : top + side, left : left + side].ravel()
        for top in range(0, num_rows, side)
        for left in range(0, num_columns, side)
    ]
    return np.concatenate(windows), [window.size for window in windows]


def _concatenate(pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, dtype=np.int64)
