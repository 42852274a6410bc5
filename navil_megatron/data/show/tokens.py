"""What each token of a microbatch is, and its colour: text, learned text, an image's scales and breaks, padding."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from navil_megatron.config.model import SPECIAL_TOKENS
from navil_megatron.data.types import EncodedSample, Microbatch, PackedSequence

type Colour = tuple[int, int, int]


class TokenKind(IntEnum):
    """Kinds of tokens; context tokens of scale n, counted from the smallest, are ``FIRST_SCALE + n``."""

    TEXT = 0
    LEARNED = 1
    IMAGE_END = 2
    LINE_BREAK = 3
    FRAME_BREAK = 4
    FIRST_SCALE = 5
    LAST_SCALE = 10  # further scales share it
    VISUAL_PADDING = 11
    TEXT_PADDING = 12


KINDS: tuple[tuple[str, Colour], ...] = (
    ("text", (122, 138, 166)),
    ("learned text", (30, 144, 96)),
    ("<img> </img>", (32, 32, 44)),
    ("line break", (86, 196, 228)),
    ("frame break", (214, 40, 64)),
    ("image, scale 1", (255, 218, 160)),
    ("scale 2", (252, 184, 100)),
    ("scale 3", (243, 146, 52)),
    ("scale 4", (217, 108, 22)),
    ("scale 5", (172, 76, 10)),
    ("scale 6 and on", (122, 50, 6)),
    ("visual padding", (248, 236, 222)),
    ("text padding", (226, 229, 236)),
)
"""Name and colour by kind."""


def token_kinds(
    rows: Sequence[PackedSequence], microbatch: Microbatch, special_token_ids: Sequence[int], merge_size: int
) -> np.ndarray:
    """[t] uint8 of ``TokenKind``: what each token of the microbatch is."""
    kinds = np.where(microbatch.visual_token_mask, TokenKind.VISUAL_PADDING, TokenKind.TEXT_PADDING).astype(np.uint8)
    samples = [sample for row in rows for sample in row.samples]
    for start, length, sample in zip(microbatch.sample_starts, microbatch.sample_lengths, samples, strict=True):
        kinds[start] = TokenKind.TEXT
        learned = microbatch.loss_weights[start : start + length - 1] > 0
        kinds[start + 1 : start + length] = np.where(learned, TokenKind.LEARNED, TokenKind.TEXT)
        _mark_images(kinds[start : start + length], sample, special_token_ids, merge_size)
    return kinds


def _mark_images(kinds: np.ndarray, sample: EncodedSample, special_token_ids: Sequence[int], merge_size: int) -> None:
    """Writes the kinds of one sample's image tokens."""
    for token, kind in (
        ("<img>", TokenKind.IMAGE_END),
        ("</img>", TokenKind.IMAGE_END),
        ("<IMG_LINE_BREAK>", TokenKind.LINE_BREAK),
        ("<IMG_FRAME_BREAK>", TokenKind.FRAME_BREAK),
    ):
        kinds[sample.input_ids == special_token_ids[SPECIAL_TOKENS.index(token)]] = kind
    last = TokenKind.LAST_SCALE - TokenKind.FIRST_SCALE
    numbers = [min(number, last) for image in sample.scales for number in range(len(image))]
    lengths = [scale.num_patches // merge_size**2 for image in sample.scales for scale in image]
    context = sample.input_ids == special_token_ids[SPECIAL_TOKENS.index("<IMG_CONTEXT>")]
    kinds[context] = TokenKind.FIRST_SCALE + np.repeat(np.array(numbers, dtype=np.int64), lengths)
