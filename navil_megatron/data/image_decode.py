"""From encoded image files to uint8 patches: what a decoder is, what both of them share, and the one by Pillow.

The reference's preprocessing to the bit: RGB, one bicubic resize from the original picture per scale, zero padding
right and below *before* (u/255 - 0.5)/0.5, patches in merge-block order. Pictures are turned upright by their EXIF
orientation, here as in the index.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from navil_megatron.blueprint.image_plan import ScalePlan

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Pillow's names of the raster formats that are read; its other plugins run interpreters or need tools."""
SIZE_DIFFERS = "size differs from the index"
_ORIENTATION_TAG = 0x0112
_SIDEWAYS_ORIENTATIONS = (5, 6, 7, 8)


class ImageDecodeError(Exception):
    """An image file that cannot be decoded, raised by all that reads one; the reason is short enough to count by."""


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """One image file and what is wanted of it."""

    file: bytes
    size: tuple[int, int]  # (height, width) that the index promised, upright
    scales: tuple[ScalePlan, ...]  # small to large
    wanted: tuple[bool, ...]  # which of the scales

    @property
    def wanted_scales(self) -> list[ScalePlan]:
        """The scales to make."""
        return [scale for scale, wanted in zip(self.scales, self.wanted, strict=True) if wanted]


type Decoded = list[torch.Tensor] | ImageDecodeError
"""[patches, 3 * patch * patch] uint8 of each wanted scale, on the host, or what is wrong with the file."""


class ImageDecoder(Protocol):
    """Makes patches of image files. Several threads may call one decoder."""

    def decode(self, jobs: Sequence[DecodeJob]) -> list[Decoded]:
        """What becomes of each job."""


def open_image(file: bytes, max_pixels: int) -> Image.Image:
    """The picture with only its header read; ImageDecodeError: no image of these formats, or too many pixels."""
    if not file:
        raise ImageDecodeError("empty file")
    try:
        image = Image.open(io.BytesIO(file), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageDecodeError(f"more than {max_pixels} pixels") from None
    except Exception as error:  # a damaged header makes Pillow raise a dozen types; none may end a run
        raise ImageDecodeError("not a readable image file") from error
    if image.width * image.height > max_pixels:
        raise ImageDecodeError(f"more than {max_pixels} pixels")
    return image


def open_promised(job: DecodeJob, max_pixels: int) -> Image.Image:
    """``open_image`` of a job whose header has the sides that the index promised; which is which shows when decoded."""
    image = open_image(job.file, max_pixels)
    if sorted(image.size) != sorted(job.size):
        raise ImageDecodeError(SIZE_DIFFERS)
    return image


def read_image_size(file: bytes, max_pixels: int) -> tuple[int, int]:
    """(height, width) as the picture is meant to be seen, EXIF orientation applied, from the header."""
    image = open_image(file, max_pixels)
    try:
        sideways = image.getexif().get(_ORIENTATION_TAG) in _SIDEWAYS_ORIENTATIONS
    except Exception as error:  # see open_image; a PNG is read to its end, where its EXIF data may lie
        raise ImageDecodeError("damaged image data") from error
    # Pillow has turned the size of a TIFF already.
    return (image.width, image.height) if sideways and image.format != "TIFF" else (image.height, image.width)


def decode_image(file: bytes, max_pixels: int) -> Image.Image:
    """The whole picture in RGB, upright; alpha is dropped, not blended."""
    return upright(open_image(file, max_pixels))


def upright(image: Image.Image) -> Image.Image:
    """An opened picture decoded, turned as its EXIF data says, in RGB."""
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # see open_image
        raise ImageDecodeError("damaged image data") from error


def patchify(picture: torch.Tensor, scale: ScalePlan, patch_size: int, merge_size: int) -> torch.Tensor:
    """[patches, 3 * patch * patch] uint8 of a resized picture [3, height, width]: zero-padded, then cut up.

    Patches come merge block by merge block, blocks in raster order, raster order inside a block; each patch is
    flattened as (channel, y, x).
    """
    rows, columns = scale.grid_height, scale.grid_width
    canvas = torch.zeros(3, rows * patch_size, columns * patch_size, dtype=torch.uint8, device=picture.device)
    canvas[:, : scale.resized_height, : scale.resized_width] = picture
    blocks = canvas.view(3, rows // merge_size, merge_size, patch_size, columns // merge_size, merge_size, patch_size)
    return blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, 3 * patch_size**2)


def blank_patches(scale: ScalePlan, patch_size: int) -> torch.Tensor:
    """[patches, 3 * patch * patch] uint8 of mid grey, the stand-in for an image that does not decode."""
    return torch.full((scale.num_patches, 3 * patch_size**2), 127, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class PillowDecoder:
    """The reference's arithmetic, on the host."""

    patch_size: int
    merge_size: int
    max_pixels: int

    def decode(self, jobs: Sequence[DecodeJob]) -> list[Decoded]:
        """See ``ImageDecoder``."""
        return [self._decode(job) for job in jobs]

    def _decode(self, job: DecodeJob) -> Decoded:
        try:
            image = upright(open_promised(job, self.max_pixels))
        except ImageDecodeError as error:
            return error
        if (image.height, image.width) != job.size:
            return ImageDecodeError(SIZE_DIFFERS)
        return [self._patches(image, scale) for scale in job.wanted_scales]

    def _patches(self, image: Image.Image, scale: ScalePlan) -> torch.Tensor:
        if image.size != (scale.resized_width, scale.resized_height):
            image = image.resize((scale.resized_width, scale.resized_height), Image.Resampling.BICUBIC)
        picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return patchify(picture, scale, self.patch_size, self.merge_size)
