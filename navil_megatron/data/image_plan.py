"""From an image's size to its scales, grids and token counts, before any pixel is touched.

Visual multi-scale packing of paper section 4.1, computed as the released preprocessing does: sizes are bounded with the
aspect ratio kept, padded to whole merge blocks, and each smaller scale is cut from the *padded* area of the one before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, sqrt

import numpy as np

from navil_megatron.config.errors import UserError
from navil_megatron.config.schema import SPECIAL_TOKENS, DataConfig, VisionConfig
from navil_megatron.data.types import ScalePlan

MAX_ASPECT_RATIO = 200
"""Longest over shortest side that the reference accepts."""


class ImageSizeError(UserError):
    """An image whose size the model cannot take."""


def bounded_size(height: int, width: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """The size of an image brought between two areas with its aspect ratio kept; a size already inside is untouched."""
    area = height * width
    if area > max_pixels:
        shrink = sqrt(area / max_pixels)
        return max(1, floor(height / shrink)), max(1, floor(width / shrink))
    if area < min_pixels:
        grow = sqrt(min_pixels / area)
        return ceil(height * grow), ceil(width * grow)
    return height, width


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePlanner:
    """Everything that decides which grids an image becomes."""

    patch_size: int
    """Side of a patch, in pixels."""
    merge_size: int
    """Patches along one side of a merge block."""
    min_pixels: int
    """Smallest area of a scale, in pixels, before padding."""
    max_pixels: int
    """Largest area of an image, in pixels, before padding."""
    multi_scale: bool
    """Make the smaller scales too."""
    scale_ratio: float
    """Side ratio of successive scales."""
    share_shrunk_limit: bool = False
    """The limit left by one image's smallest scale caps the next image, as in the released demo."""

    @classmethod
    def from_config(cls, data: DataConfig, vision: VisionConfig) -> "ImagePlanner":
        """The planner of a run."""
        return cls(
            patch_size=vision.patch_size,
            merge_size=vision.merge_size,
            min_pixels=data.min_image_pixels,
            max_pixels=data.max_image_pixels,
            multi_scale=data.multi_scale,
            scale_ratio=data.scale_ratio,
            share_shrunk_limit=data.share_shrunk_limit,
        )

    def plan_images(self, sizes: Sequence[tuple[int, int]]) -> tuple[tuple[ScalePlan, ...], ...]:
        """The scales, small to large, of each (height, width) of one sample.

        Raises:
            ImageSizeError: an image is empty or longer than 200 times its width.
        """
        plans = []
        limit: float = self.max_pixels
        for height, width in sizes:
            scales, shrunk_limit = self._plan_scales(height, width, limit)
            plans.append(scales)
            if self.share_shrunk_limit:
                limit = shrunk_limit
        return tuple(plans)

    def _plan_scales(self, height: int, width: int, limit: float) -> tuple[tuple[ScalePlan, ...], float]:
        """One image's scales, small to large, and the area limit that was in force when the search for more ended."""
        if min(height, width) < 1 or max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ImageSizeError(
                f"an image of {height} x {width} pixels has an aspect ratio beyond {MAX_ASPECT_RATIO}: crop it"
            )
        scales = [self._plan_scale(height, width, limit)]
        while self.multi_scale:
            limit = num_patches(scales[0]) * self.patch_size**2 * self.scale_ratio**2
            if limit < self.min_pixels:
                break
            smaller = self._plan_scale(height, width, limit)
            if num_patches(smaller) >= num_patches(scales[0]):
                break
            scales.insert(0, smaller)
        return tuple(scales), limit

    def _plan_scale(self, height: int, width: int, limit: float) -> ScalePlan:
        """One scale: the bounded size, and its grid padded to whole merge blocks."""
        resized_height, resized_width = bounded_size(height, width, self.min_pixels, limit)
        block = self.patch_size * self.merge_size
        return ScalePlan(
            resized_height=resized_height,
            resized_width=resized_width,
            grid_height=ceil(resized_height / block) * self.merge_size,
            grid_width=ceil(resized_width / block) * self.merge_size,
        )


def num_patches(scale: ScalePlan) -> int:
    """Patches of one scale, padding included."""
    return scale.grid_height * scale.grid_width


def image_grid_thw(images: Sequence[Sequence[ScalePlan]]) -> np.ndarray:
    """[num_scales, 3] int64: frames (always 1), patch rows and patch columns, in order of appearance."""
    rows = [(1, scale.grid_height, scale.grid_width) for scales in images for scale in scales]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def image_token_layout(scales: Sequence[ScalePlan], merge_size: int) -> list[tuple[str, int]]:
    """The tokens that stand for one image, as (token, run length): line breaks end rows, frame breaks end scales."""
    layout = [("<img>", 1)]
    for scale in scales:
        line = [("<IMG_CONTEXT>", scale.grid_width // merge_size), ("<IMG_LINE_BREAK>", 1)]
        layout += line * (scale.grid_height // merge_size)
        layout.append(("<IMG_FRAME_BREAK>", 1))
    layout.append(("</img>", 1))
    return layout


def image_token_ids(scales: Sequence[ScalePlan], merge_size: int, special_token_ids: Sequence[int]) -> np.ndarray:
    """[n] int64: ``image_token_layout`` as token ids; ``special_token_ids`` in the order of ``SPECIAL_TOKENS``."""
    layout = image_token_layout(scales, merge_size)
    ids = [special_token_ids[SPECIAL_TOKENS.index(token)] for token, _ in layout]
    return np.repeat(np.array(ids, dtype=np.int64), [run for _, run in layout])


def count_image_tokens(scales: Sequence[ScalePlan], merge_size: int) -> tuple[int, int]:
    """How many tokens of one image go to the text experts (breaks, ``</img>``) and how many to the visual experts."""
    rows = sum(scale.grid_height // merge_size for scale in scales)
    context = sum(num_patches(scale) for scale in scales) // merge_size**2
    return rows + len(scales) + 1, context + 1


def visual_tokens(input_ids: np.ndarray, special_token_ids: Sequence[int]) -> np.ndarray:
    """[n] bool: tokens for the visual experts, which are <IMG_CONTEXT> and <img> (spec, section 1.3)."""
    context, start = (special_token_ids[SPECIAL_TOKENS.index(token)] for token in ("<IMG_CONTEXT>", "<img>"))
    return (input_ids == context) | (input_ids == start)
