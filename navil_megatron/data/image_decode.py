"""From an encoded image file to normalised patches, by Pillow.

The reference's preprocessing to the bit: RGB, one bicubic resize from the original picture per scale, zero padding
right and below *before* (u/255 - 0.5)/0.5, patches in merge-block order. Pictures are turned upright by their EXIF
orientation, here as in the index.
"""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from navil_megatron.data.image_plan import num_patches
from navil_megatron.data.types import ScalePlan

MAX_SOURCE_PIXELS = 2**26
"""Largest picture that is decoded (8192 x 8192): a few bytes of file can claim any size."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Pillow's names of the raster formats that are read; its other plugins run interpreters or need tools."""

_ORIENTATION_TAG = 0x0112
_SIDEWAYS_ORIENTATIONS = (5, 6, 7, 8)


class ImageDecodeError(Exception):
    """An image file that cannot be decoded; the message is the reason, short enough to count by."""


def open_image(file: bytes, max_pixels: int = MAX_SOURCE_PIXELS) -> Image.Image:
    """The picture behind the bytes with only its header read.

    Raises:
        ImageDecodeError: not an image in a known format, or more pixels than allowed.
    """
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


def read_image_size(file: bytes) -> tuple[int, int]:
    """(height, width) as the picture is meant to be seen, EXIF orientation applied, from the header.

    Raises:
        ImageDecodeError: not an image in a known format, or too many pixels.
    """
    image = open_image(file)
    try:
        sideways = image.getexif().get(_ORIENTATION_TAG) in _SIDEWAYS_ORIENTATIONS
    except Exception as error:  # see open_image; a PNG is read to its end, where its EXIF data may lie
        raise ImageDecodeError("damaged image data") from error
    return (image.width, image.height) if sideways else (image.height, image.width)


def decode_image(file: bytes) -> Image.Image:
    """The whole picture in RGB, upright; alpha is dropped, not blended.

    Raises:
        ImageDecodeError: the file is damaged.
    """
    image = open_image(file)
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # see open_image
        raise ImageDecodeError("damaged image data") from error


def image_patches(image: Image.Image, scale: ScalePlan, patch_size: int, merge_size: int) -> np.ndarray:
    """[patches, 3 * patch * patch] uint8 of one scale: resized, padded, each patch flattened as (channel, y, x).

    Patches come merge block by merge block, blocks in raster order, raster order inside a block.
    """
    if image.size != (scale.resized_width, scale.resized_height):
        image = image.resize((scale.resized_width, scale.resized_height), Image.Resampling.BICUBIC)
    rows, columns = scale.grid_height, scale.grid_width
    canvas = np.zeros((rows * patch_size, columns * patch_size, 3), dtype=np.uint8)
    canvas[: scale.resized_height, : scale.resized_width] = np.asarray(image)
    blocks = canvas.reshape(
        rows // merge_size, merge_size, patch_size, columns // merge_size, merge_size, patch_size, 3
    )
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3 * patch_size**2)


def decode_patches(file: bytes, scales: Sequence[ScalePlan], patch_size: int, merge_size: int) -> np.ndarray:
    """[p, 3 * patch * patch] uint8: all scales of one image from a single decode, in the order given.

    Raises:
        ImageDecodeError: the file is damaged.
    """
    image = decode_image(file)
    return np.concatenate([image_patches(image, scale, patch_size, merge_size) for scale in scales])


def blank_patches(scales: Sequence[ScalePlan], patch_size: int) -> np.ndarray:
    """[p, 3 * patch * patch] uint8 of mid grey, the stand-in for an image that does not decode."""
    return np.full((sum(num_patches(scale) for scale in scales), 3 * patch_size**2), 127, dtype=np.uint8)


def normalise(patches: np.ndarray) -> torch.Tensor:
    """float32 from -1 to 1 of uint8 patches, rounded step by step as the reference rounds."""
    values = patches.astype(np.float32)
    values /= 255
    values -= 0.5
    values /= 0.5
    return torch.from_numpy(values)
