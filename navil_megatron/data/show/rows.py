"""Packed rows as people look at them: every token a cell, the images as the model sees them, what is said and learned.

A row is a strip of cells, wrapped into lines; under it a thin strip holds the loss weights. Images are rebuilt at every
scale from the very patches that the model is given.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from navil_megatron.data.show.tokens import KINDS, Colour, TokenKind, token_kinds
from navil_megatron.data.tokenizer import SampleTokenizer
from navil_megatron.data.types import EncodedSample, Microbatch, PackedSequence, SampleId

LINE_WIDTH = 1184  # pixels of the longest line of cells
CELL_HEIGHT = 22
_CELL_WIDTHS = (3, 12)  # narrowest and widest cell; short rows get wide cells
_LOSS_HEIGHT = 8
_THUMBNAIL = (320, 220)
"""Largest width and height of an image's largest scale; its others are drawn to the same measure."""
_MOST_GROWN = 3.0  # small images are drawn larger, to so many times their size
_TRACK: Colour = (236, 239, 243)
WEIGHT_COLOUR: Colour = (18, 96, 64)
_ABSENT: Colour = (212, 217, 226)

type Line = tuple[Image.Image, list[tuple[int, int]]]
"""Cells, and the samples that begin among them: pixels from the left, number."""


class TextRun(NamedTuple):
    """A stretch of a sample's text."""

    text: str
    is_learned: bool
    is_mark: bool  # A control token, or an image


class ShownSample(NamedTuple):
    """One sample."""

    number: int  # from 1, over all rows
    name: str
    num_tokens: int
    num_learned: int
    images: list[list[Image.Image]]  # each at its scales, small to large
    texts: list[TextRun]


class ShownRow(NamedTuple):
    """One row."""

    title: str
    cost: str
    counts: dict[int, int]
    lines: list[Line]
    samples: list[ShownSample]


def shown_rows(
    rows: Sequence[PackedSequence],
    microbatch: Microbatch,
    tokenizer: SampleTokenizer,
    patch_size: int,
    merge_size: int,
    names: Mapping[SampleId, str],
    first_row: int = 0,
) -> list[ShownRow]:
    """The rows of one microbatch; ``names`` is what to call the samples, ``first_row`` counts in the batch."""
    kinds = token_kinds(rows, microbatch, tokenizer.special_token_ids, merge_size)
    pictures = iter(_scale_pictures(microbatch, patch_size, merge_size))
    samples = []
    for number, sample in enumerate((sample for row in rows for sample in row.samples), 1):
        start, length = microbatch.sample_starts[number - 1], len(sample.input_ids)
        own = kinds[start : start + length]
        images = [[next(pictures) for _ in scales] for scales in sample.scales]
        learned = int(np.count_nonzero(own == TokenKind.LEARNED))
        texts = _text_runs(sample, own, tokenizer)
        samples.append(ShownSample(number, names[sample.sample], length, learned, images, texts))
    ends, shown, begin = np.cumsum(microbatch.segment_lengths), [], 0
    for row_number, row in enumerate(rows, first_row):
        stop = begin + row.seq_length
        segments = np.diff(ends[(ends > begin) & (ends <= stop)], prepend=begin)
        of_row, samples = samples[: len(row.samples)], samples[len(row.samples) :]
        counts = dict(zip(*map(np.ndarray.tolist, np.unique(kinds[begin:stop], return_counts=True)), strict=True))
        fill = sum(sample.num_tokens for sample in of_row) / row.seq_length
        title = f"Row {row_number}: {fill:.1%} full, {len(of_row)} samples"
        lines = _lines(range(begin, stop), kinds, microbatch)
        shown.append(ShownRow(title, _cost(row, segments), counts, lines, of_row))
        begin = stop
    return shown


def unpatchify(
    patches: torch.Tensor, grid_height: int, grid_width: int, patch_size: int, merge_size: int
) -> np.ndarray:
    """[height, width, 3] uint8 of one scale image, from its patches [p, 3 * patch * patch] uint8, padding included.

    Patches lie in merge-block order; ``grid_height`` and ``grid_width`` count them down and across.
    """
    shape = (grid_height // merge_size, grid_width // merge_size, merge_size, merge_size, 3, patch_size, patch_size)
    pixels = patches.cpu().numpy().reshape(shape).transpose(0, 2, 5, 1, 3, 6, 4)
    return np.ascontiguousarray(pixels.reshape(grid_height * patch_size, grid_width * patch_size, 3))


def draw_cells(kinds: np.ndarray, loss_weights: np.ndarray, cell_width: int, largest_weight: float) -> Image.Image:
    """One line of tokens: a cell each in the colour of its kind, and bars for the loss weights below."""
    cells = np.array([colour for _, colour in KINDS], dtype=np.uint8)[kinds]
    strip = np.broadcast_to(cells, (CELL_HEIGHT, *cells.shape))
    bars = np.ceil(loss_weights / largest_weight * _LOSS_HEIGHT) if largest_weight else np.zeros(len(kinds))
    is_bar = np.arange(_LOSS_HEIGHT, 0, -1)[:, None] <= bars
    loss = np.where(is_bar[..., None], np.array(WEIGHT_COLOUR), np.array(_TRACK)).astype(np.uint8)
    gap = np.full((2, *cells.shape), 255, dtype=np.uint8)
    return Image.fromarray(np.concatenate([strip, gap, loss]).repeat(cell_width, axis=1))


def size_on_page(scale: Image.Image, largest: Image.Image) -> tuple[int, int]:
    """Width and height at which one scale of an image is drawn."""
    factor = min(_MOST_GROWN, _THUMBNAIL[0] / largest.width, _THUMBNAIL[1] / largest.height)
    return max(1, round(scale.width * factor)), max(1, round(scale.height * factor))


def _lines(tokens: range, kinds: np.ndarray, microbatch: Microbatch) -> list[Line]:
    cell_width = min(max(LINE_WIDTH // len(tokens), _CELL_WIDTHS[0]), _CELL_WIDTHS[1])
    weights, lines = microbatch.loss_weights, []
    for first in tokens[:: LINE_WIDTH // cell_width]:
        stop = min(first + LINE_WIDTH // cell_width, tokens.stop)
        cells = draw_cells(kinds[first:stop], weights[first:stop], cell_width, float(weights.max()))
        starts = enumerate(microbatch.sample_starts, 1)
        lines.append((cells, [((at - first) * cell_width, number) for number, at in starts if first <= at < stop]))
    return lines


def _cost(row: PackedSequence, segments: np.ndarray) -> str:
    patches = [scale.grid_height * scale.grid_width for s in row.samples for image in s.scales for scale in image]
    return (
        f"{len(patches)} images at all scales with {sum(patches):,} patches; cost: attention "
        f"{int((segments.astype(np.int64) ** 2).sum()):,} pairs of tokens, "
        f"{sum(count**2 for count in patches):,} pairs of patches"
    )


def _scale_pictures(microbatch: Microbatch, patch_size: int, merge_size: int) -> list[Image.Image]:
    """Every scale image in order; grey where this rank holds no pixels."""
    pictures, first = [], 0
    is_held = microbatch.vision_plan.is_mine
    for (_, height, width), held in zip(microbatch.image_grid_thw.tolist(), is_held, strict=True):
        if held and microbatch.pixel_values is not None:
            patches = microbatch.pixel_values[first : first + height * width]
            pictures.append(Image.fromarray(unpatchify(patches, height, width, patch_size, merge_size)))
            first += height * width
        else:
            pictures.append(Image.new("RGB", (width * patch_size, height * patch_size), _ABSENT))
    return pictures


def _text_runs(sample: EncodedSample, kinds: np.ndarray, tokenizer: SampleTokenizer) -> list[TextRun]:
    """The sample's text, cut where learning begins and ends, with marks for images and control tokens."""
    ids, decode = sample.input_ids, tokenizer.hugging_face.decode
    is_learned, is_text = kinds == TokenKind.LEARNED, np.isin(kinds, [TokenKind.TEXT, TokenKind.LEARNED])
    is_mark = np.isin(ids, tokenizer.hugging_face.all_special_ids)
    if not is_mark[0]:  # nothing predicts the first token, but a character of several tokens is shown whole
        is_learned[:1] = is_learned[1:2]
    cuts = np.flatnonzero(np.diff(is_learned * 4 + is_mark * 2 + is_text)) + 1
    runs = []
    for first, stop in pairwise([0, *cuts.tolist(), len(ids)]):
        if is_text[first]:
            runs.append(TextRun(decode(ids[first:stop].tolist()), bool(is_learned[first]), bool(is_mark[first])))
        else:
            num_images = np.count_nonzero(kinds[first:stop] == TokenKind.IMAGE_END) // 2
            runs += [TextRun("image", False, True)] * num_images
    return runs
