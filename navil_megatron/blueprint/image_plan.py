"""From an image's size to its scales, grids and token counts, before any pixel is touched.

Visual multi-scale packing of paper section 4.1, computed as the released preprocessing does: sizes are bounded with the
aspect ratio kept, padded to whole merge blocks, and each smaller scale is cut from the *padded* area of the one before.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from navil_megatron.config.data import DataConfig
from navil_megatron.config.errors import UserError
from navil_megatron.config.model import SPECIAL_TOKENS
from navil_megatron.config.vision import VisionConfig

MAX_ASPECT_RATIO = 200
"""Longest over shortest side that the reference accepts."""

Grid = tuple[int, int, int]
"""Frames, patch rows, patch columns of one scale-image."""


class ImageSizeError(UserError):
    """An image whose size the model cannot take."""


@dataclass(frozen=True, slots=True)
class ScalePlan:
    """One scale of one image: what to resize to and how many patches result."""

    resized_height: int
    """Pixels after resizing, before padding."""
    resized_width: int
    grid_height: int
    """Patch rows after padding to whole merge blocks."""
    grid_width: int

    @property
    def grid(self) -> Grid:
        """Its patches, of one frame."""
        return 1, self.grid_height, self.grid_width

    @property
    def num_patches(self) -> int:
        """Patches, padding included."""
        return self.grid_height * self.grid_width


@dataclass(frozen=True, slots=True)
class Pyramids:
    """Every scale that some images can have; n images, k scales of the image that has most."""

    resized: np.ndarray
    """[n, k, 2] int64: height and width in pixels after resizing, large to small."""
    grid: np.ndarray
    """[n, k, 2] int64: patch rows and columns after padding; 0 behind an image's last scale."""
    num_scales: np.ndarray
    """[n] int64: scales of each image; 0 where the aspect ratio is refused."""

    def patches(self, keep: np.ndarray) -> np.ndarray:
        """[n, k] int64: patches of the scales that ``keep`` [n, k] marks, 0 elsewhere."""
        return self.grid.prod(axis=2) * keep


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

    def plan_images(self, sizes: Sequence[tuple[int, int]], dropped: int = 0) -> tuple[tuple[ScalePlan, ...], ...]:
        """The scales, small to large, of each (height, width) of one sample, in order of appearance; each image does
        without its ``dropped`` largest, but the smallest always stays.

        Raises:
            ImageSizeError: an image is empty or longer than 200 times its width.
        """
        heights, widths = (np.array([size[axis] for size in sizes], dtype=np.int64) for axis in (0, 1))
        pyramids = self.plan_pyramids(heights, widths, np.arange(len(sizes)))
        for (height, width), num_scales in zip(sizes, pyramids.num_scales, strict=True):
            if not num_scales:
                raise ImageSizeError(
                    f"an image of {height} x {width} pixels has an aspect ratio beyond {MAX_ASPECT_RATIO}: crop it"
                )
        kept = self.kept_scales(pyramids, np.full(len(sizes), dropped))
        return tuple(
            tuple(ScalePlan(*map(int, resized[scale]), *map(int, grid[scale])) for scale in np.flatnonzero(keep)[::-1])
            for resized, grid, keep in zip(pyramids.resized, pyramids.grid, kept, strict=True)
        )

    def count_tokens(self, images: Sequence[Sequence[ScalePlan]]) -> int:
        """Tokens of all images of a sample."""
        return sum(sum(count_image_tokens(scales, self.merge_size)) for scales in images)

    def plan_pyramids(self, heights: np.ndarray, widths: np.ndarray, numbers: np.ndarray) -> Pyramids:
        """All scales of many images at once; heights and widths in pixels, and the place of each image in its sample,
        from 0: all [n] int64.
        """
        if not (self.share_shrunk_limit and self.multi_scale) or not len(numbers):
            limits = np.full(len(heights), float(self.max_pixels))
            return self._plan_pyramids(heights, widths, limits)[0]
        # one image's limit follows from the image before it in the sample, so a sample is planned front to back
        limit, planned = float(self.max_pixels), []
        for height, width, number in zip(heights, widths, numbers, strict=True):
            limit = float(self.max_pixels) if number == 0 else limit
            pyramid, limits = self._plan_pyramids(height[None], width[None], np.array([limit]))
            limit = float(limits[0])
            planned.append(pyramid)
        return _stack(planned)

    def kept_scales(self, pyramids: Pyramids, dropped: np.ndarray) -> np.ndarray:
        """[n, k] bool: the scales that images get when each does without its ``dropped`` [n] largest."""
        scale = np.arange(pyramids.grid.shape[1])
        first = np.minimum(dropped, pyramids.num_scales - 1)[:, None]
        keep = scale >= first if self.multi_scale else scale == first
        return keep & (scale < pyramids.num_scales[:, None])

    def _plan_pyramids(
        self, heights: np.ndarray, widths: np.ndarray, limits: np.ndarray
    ) -> tuple[Pyramids, np.ndarray]:
        """The pyramids under these area limits, and the limits in force when the search for more scales ended."""
        block = self.patch_size * self.merge_size
        short, long = np.minimum(heights, widths), np.maximum(heights, widths)
        images = np.flatnonzero((short >= 1) & (long <= MAX_ASPECT_RATIO * short))  # whose search goes on
        limits, num_scales = limits.copy(), np.zeros(len(heights), dtype=np.int64)
        fewest = np.full(len(heights), np.iinfo(np.int64).max)
        resized_scales: list[np.ndarray] = []
        grid_scales: list[np.ndarray] = []
        while len(images) or not grid_scales:
            resized = bounded_sizes(heights[images], widths[images], float(self.min_pixels), limits[images])
            grid = -(-resized // block) * self.merge_size
            patches = grid.prod(axis=1)
            smaller = patches < fewest[images]
            images, resized, grid, patches = images[smaller], resized[smaller], grid[smaller], patches[smaller]
            if not len(images) and grid_scales:
                break
            for scales, planned in ((resized_scales, resized), (grid_scales, grid)):
                scales.append(np.zeros((len(heights), 2), dtype=np.int64))
                scales[-1][images] = planned
            num_scales[images] += 1
            fewest[images] = patches
            limits[images] = patches * self.patch_size**2 * self.scale_ratio**2
            images = images[limits[images] >= self.min_pixels]
        return Pyramids(np.stack(resized_scales, axis=1), np.stack(grid_scales, axis=1), num_scales), limits


def bounded_sizes(heights: np.ndarray, widths: np.ndarray, min_pixels: float, limits: np.ndarray) -> np.ndarray:
    """[n, 2] int64: heights and widths [n] brought between the smallest area and the largest of each, [n] float64, with
    the aspect ratio kept; a size inside is untouched.
    """
    sizes = np.stack([heights, widths], axis=1)
    area = np.maximum(heights * widths, 1).astype(np.float64)
    shrunk = np.maximum(1, np.floor(sizes / np.sqrt(area / limits)[:, None]))
    grown = np.ceil(sizes * np.sqrt(min_pixels / area)[:, None])
    bounded = np.where((area > limits)[:, None], shrunk, np.where((area < min_pixels)[:, None], grown, sizes))
    return bounded.astype(np.int64)


def _stack(planned: Sequence[Pyramids]) -> Pyramids:
    """Pyramids of one image each, as one."""
    most = max(pyramid.grid.shape[1] for pyramid in planned)

    def padded(scales: np.ndarray) -> np.ndarray:
        return np.pad(scales, ((0, 0), (0, most - scales.shape[1]), (0, 0)))

    return Pyramids(
        np.concatenate([padded(pyramid.resized) for pyramid in planned]),
        np.concatenate([padded(pyramid.grid) for pyramid in planned]),
        np.concatenate([pyramid.num_scales for pyramid in planned]),
    )


def image_grid_thw(images: Sequence[Sequence[ScalePlan]]) -> np.ndarray:
    """[num_scales, 3] int64: frames (always 1), patch rows and patch columns, in order of appearance."""
    return np.array([scale.grid for scales in images for scale in scales], dtype=np.int64).reshape(-1, 3)


def grids_of(image_grid_thw: np.ndarray) -> tuple[Grid, ...]:
    """[num_scales, 3] as tuples."""
    return tuple((frames, rows, columns) for frames, rows, columns in image_grid_thw.tolist())


def num_patches(grids: Iterable[Grid]) -> int:
    """Patches of these scale-images."""
    return sum(frames * rows * columns for frames, rows, columns in grids)


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
    context = sum(scale.num_patches for scale in scales) // merge_size**2
    return rows + len(scales) + 1, context + 1


def visual_tokens(input_ids: np.ndarray, special_token_ids: Sequence[int]) -> np.ndarray:
    """[n] bool: tokens for the visual experts, which are <IMG_CONTEXT> and <img>."""
    context, start = (special_token_ids[SPECIAL_TOKENS.index(token)] for token in ("<IMG_CONTEXT>", "<img>"))
    return (input_ids == context) | (input_ids == start)
