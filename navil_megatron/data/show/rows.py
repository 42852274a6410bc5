"""Packed rows as one picture that a person looks at: every token a cell, the images as the model sees them.

A row is a strip of cells, wrapped into lines; under it a thin strip holds the loss weights. Below a line stand the
samples that begin in it, with their images at every scale, rebuilt from the patches, and their first words.
"""

from collections.abc import Callable, Sequence
from itertools import batched, pairwise
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from navil_megatron.config.model import SPECIAL_TOKENS
from navil_megatron.data.show.layout import (
    BACKGROUND,
    INK,
    MUTED,
    Colour,
    TextRun,
    draw_badge,
    draw_text,
    flow,
    stack,
    with_margin,
)
from navil_megatron.data.show.tokens import COLOURS, LEGEND, SCALE_COLOURS, TokenKind, token_kinds
from navil_megatron.data.types import EncodedSample, Microbatch, PackedSequence, SampleId

PAGE_WIDTH = 1760
"""Pixels between the margins."""
CELL_HEIGHT = 24
_CELL_WIDTHS = (3, 12)
"""Narrowest and widest cell; short rows get wide cells."""
_LOSS_HEIGHT = 8
_MARGIN = 40
_THUMBNAIL = (300, 160)
"""Largest width and height of an image's largest scale; its others are drawn to the same measure."""
_CARD_WIDTHS = (250, PAGE_WIDTH - 20)
_TEXT_WIDTH = 1000
_CARD_LINES = 5
"""Lines of a sample's text."""
_TRACK: Colour = (236, 239, 243)
_WEIGHT: Colour = (18, 96, 64)
_FRAME: Colour = (212, 217, 226)


class _Card(NamedTuple):
    """One sample on the page."""

    start: int
    """First token, counted in the microbatch."""
    stop: int
    """The token after its last."""
    badge: str
    picture: Image.Image


def draw_rows(
    rows: Sequence[PackedSequence],
    microbatch: Microbatch,
    decode_text: Callable[[Sequence[int]], str],
    special_token_ids: Sequence[int],
    patch_size: int,
    merge_size: int,
    title: str,
    name_of: Callable[[SampleId], str] | None = None,
) -> Image.Image:
    """The page of one microbatch, which gives the same picture always.

    Args:
        rows: what each row holds.
        microbatch: the rows, laid end to end.
        decode_text: token ids -> text, control tokens spelled out.
        special_token_ids: in the order of ``SPECIAL_TOKENS``.
        patch_size: side of a patch, in pixels.
        merge_size: patches along one side of a merge block.
        title: first line of the page, e.g. seed and step.
        name_of: what to call a sample, e.g. shard and key; without it, source and position.
    """
    kinds = token_kinds(rows, microbatch, special_token_ids, merge_size)
    pictures = iter(_scale_pictures(microbatch, patch_size, merge_size))
    samples = [sample for row in rows for sample in row.samples]
    cards = []
    for badge, (start, sample) in enumerate(zip(microbatch.sample_starts, samples, strict=True), start=1):
        stop = start + len(sample.input_ids)
        name = "source {}, sample {}".format(*sample.sample) if name_of is None else name_of(sample.sample)
        images = [[next(pictures) for _ in scales] for scales in sample.scales]
        texts = _text_runs(sample, kinds[start:stop], special_token_ids, decode_text)
        card = _draw_card(str(badge), f"{name}  ({stop - start:,} tokens)", images, texts)
        cards.append(_Card(start, stop, str(badge), card))
    ends, first = np.cumsum(microbatch.segment_lengths), 0
    blocks = [draw_text([(title, INK)], 28, PAGE_WIDTH, 2), draw_legend()]
    for number, row in enumerate(rows):
        stop = first + row.seq_length
        segments = np.diff(ends[(ends > first) & (ends <= stop)], prepend=first)
        head = _describe(number, row, segments, kinds[first:stop])
        blocks += [Image.new("RGB", (1, 8), BACKGROUND), draw_text([(head, INK)], 18, PAGE_WIDTH, 2)]
        blocks += _draw_lines(range(first, stop), kinds, microbatch.loss_weights, cards)
        first = stop
    return with_margin(stack(blocks, gap=12), _MARGIN)


def unpatchify(
    patches: torch.Tensor, grid_height: int, grid_width: int, patch_size: int, merge_size: int
) -> np.ndarray:
    """[height, width, 3] uint8 of one scale image, from its patches in merge-block order, padding included.

    Args:
        patches: [p, 3 * patch * patch] uint8.
        grid_height: patches down.
        grid_width: patches across.
        patch_size: side of a patch, in pixels.
        merge_size: patches along one side of a merge block.
    """
    blocks = (
        patches.cpu()
        .numpy()
        .reshape(grid_height // merge_size, grid_width // merge_size, merge_size, merge_size, 3, patch_size, patch_size)
    )
    pixels = blocks.transpose(0, 2, 5, 1, 3, 6, 4)
    return np.ascontiguousarray(pixels.reshape(grid_height * patch_size, grid_width * patch_size, 3))


def draw_legend() -> Image.Image:
    """What each colour means."""
    entries = [(COLOURS[kind], text) for kind, text in LEGEND] + [(_WEIGHT, "loss weight of the next token")]
    return flow([_beside_swatch(colour, text) for colour, text in entries], PAGE_WIDTH, 18)


def draw_cells(kinds: np.ndarray, loss_weights: np.ndarray, cell_width: int, largest_weight: float) -> Image.Image:
    """One line of tokens: a cell each in the colour of its kind, and bars for the loss weights below."""
    cells = np.array(COLOURS, dtype=np.uint8)[kinds]
    strip = np.broadcast_to(cells, (CELL_HEIGHT, *cells.shape))
    bars = np.ceil(loss_weights / largest_weight * _LOSS_HEIGHT) if largest_weight else np.zeros(len(kinds))
    is_bar = np.arange(_LOSS_HEIGHT, 0, -1)[:, None] <= bars
    loss = np.where(is_bar[..., None], np.array(_WEIGHT), np.array(_TRACK)).astype(np.uint8)
    gap = np.full((2, *cells.shape), BACKGROUND[0], dtype=np.uint8)
    return Image.fromarray(np.concatenate([strip, gap, loss]).repeat(cell_width, axis=1))


def _describe(number: int, row: PackedSequence, segments: np.ndarray, kinds: np.ndarray) -> str:
    """What a row holds and what it costs."""
    used = sum(len(sample.input_ids) for sample in row.samples)
    patches = [scale.grid_height * scale.grid_width for s in row.samples for image in s.scales for scale in image]
    return (
        f"Row {number}:  {used / row.seq_length:.1%} full, {used:,} of {row.seq_length:,} tokens in {len(row.samples)} "
        f"samples, {np.count_nonzero(kinds == TokenKind.LEARNED):,} learned;  {len(patches)} images at all scales with "
        f"{sum(patches):,} patches;  cost: attention {int((segments.astype(np.int64) ** 2).sum()):,} pairs of tokens, "
        f"{sum(count**2 for count in patches):,} pairs of patches"
    )


def _draw_lines(
    tokens: range, kinds: np.ndarray, loss_weights: np.ndarray, cards: Sequence[_Card]
) -> list[Image.Image]:
    """The lines of the row that holds these tokens, each with the cards of the samples that begin in it."""
    cell_width = min(max(PAGE_WIDTH // len(tokens), _CELL_WIDTHS[0]), _CELL_WIDTHS[1])
    largest_weight = float(loss_weights.max())
    lines = []
    for line in batched(tokens, PAGE_WIDTH // cell_width):
        first, stop = line[0], line[-1] + 1
        cells = draw_cells(kinds[first:stop], loss_weights[first:stop], cell_width, largest_weight)
        here = [card for card in cards if first <= card.start < stop]
        marks = [(0, draw_badge(card.badge, MUTED)) for card in cards if card.start < first < card.stop]
        marks += [((card.start - first) * cell_width, draw_badge(card.badge, INK)) for card in here]
        parts = [_draw_marks(marks, cells.width), cells]
        if here:
            parts += [Image.new("RGB", (1, 8), BACKGROUND), flow([card.picture for card in here], PAGE_WIDTH, 12)]
        lines.append(stack(parts))
    return lines


def _draw_marks(marks: Sequence[tuple[int, Image.Image]], width: int) -> Image.Image:
    """Badges above the cells they belong to, in as many lanes as keep them apart, each with a line down to its cell."""
    free_from: list[int] = []  # by lane, the lowest first
    placed = []
    for x, badge in marks:
        lane = next((lane for lane, free in enumerate(free_from) if free <= x), len(free_from))
        free_from[lane : lane + 1] = [x + badge.width + 3]
        placed.append((x, lane, badge))
    lane_height = max((badge.height for _, badge in marks), default=0) + 2
    height = lane_height * len(free_from) + 4
    picture = Image.new("RGB", (max([width, *free_from]), height), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for x, lane, _ in placed:
        draw.line((x, height - 4 - lane_height * lane, x, height), fill=INK)
    for x, lane, badge in placed:
        picture.paste(badge, (x, height - 4 - lane_height * (lane + 1)))
    return picture


def _draw_card(badge: str, head: str, images: Sequence[Sequence[Image.Image]], texts: Sequence[TextRun]) -> Image.Image:
    """One sample: its name, its images at every scale, and its first words."""
    drawn = [flow(_draw_thumbnails(image), _CARD_WIDTHS[1], 6) for image in images]
    pictures = [flow(drawn, _CARD_WIDTHS[1], 24)] if drawn else []
    name = draw_text([(head, MUTED)], 14, _CARD_WIDTHS[1])
    width = min(max([_CARD_WIDTHS[0], name.width + 60, *(picture.width for picture in pictures)]), _CARD_WIDTHS[1])
    text = draw_text(texts, 15, min(width, _TEXT_WIDTH), _CARD_LINES)
    return with_margin(stack([flow([draw_badge(badge, INK), name], PAGE_WIDTH, 8), *pictures, text], 6), 8, _FRAME)


def _draw_thumbnails(scales: Sequence[Image.Image]) -> list[Image.Image]:
    """An image at all its scales, to one measure, each with a bar in its colour in the strip and its size."""
    largest = scales[-1]
    shrink = min(1.0, _THUMBNAIL[0] / largest.width, _THUMBNAIL[1] / largest.height)
    thumbnails = []
    for number, picture in enumerate(scales):
        size = max(1, round(picture.width * shrink)), max(1, round(picture.height * shrink))
        bar = Image.new("RGB", (size[0], 5), SCALE_COLOURS[min(number, len(SCALE_COLOURS) - 1)])
        caption = draw_text([(f"{picture.width} x {picture.height}", MUTED)], 12)
        thumbnails.append(stack([picture.resize(size, Image.Resampling.LANCZOS), bar, caption], 1))
    return thumbnails


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
            pictures.append(Image.new("RGB", (width * patch_size, height * patch_size), _FRAME))
    return pictures


def _text_runs(
    sample: EncodedSample,
    kinds: np.ndarray,
    special_token_ids: Sequence[int],
    decode_text: Callable[[Sequence[int]], str],
) -> list[TextRun]:
    """The sample's text in the colours of the strip, with a mark where an image stands."""
    is_image = (kinds != TokenKind.TEXT) & (kinds != TokenKind.LEARNED)
    group = np.where(is_image, TokenKind.IMAGE_END, kinds)
    edges = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(group)]
    runs: list[TextRun] = []
    image_start = special_token_ids[SPECIAL_TOKENS.index("<img>")]
    for first, stop in pairwise(edges):
        ids = sample.input_ids[first:stop].tolist()
        if is_image[first]:
            runs.append((" [image] " * ids.count(image_start), MUTED))
        else:
            runs.append((decode_text(ids), COLOURS[kinds[first]]))
    return runs


def _beside_swatch(colour: Colour, text: str) -> Image.Image:
    """A legend entry."""
    return flow([Image.new("RGB", (18, 18), colour), draw_text([(text, INK)], 14)], PAGE_WIDTH, 6)
