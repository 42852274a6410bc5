"""Packed rows as a page or picture: cells in the colours of their tokens, images as the model sees them, the texts."""

import base64
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from navil_megatron.blueprint.image_plan import ImagePlanner, image_grid_thw, visual_tokens
from navil_megatron.data.encode import encode_sample
from navil_megatron.data.rank_share import plan_microbatch
from navil_megatron.data.show.page import render_rows
from navil_megatron.data.show.picture import draw_rows
from navil_megatron.data.show.rows import CELL_HEIGHT, LINE_WIDTH, ShownRow, draw_cells, shown_rows, unpatchify
from navil_megatron.data.show.tokens import KINDS, TokenKind, token_kinds
from navil_megatron.data.tokenizer import SampleTokenizer, build_tokenizer
from navil_megatron.data.types import ALONE, Content, Microbatch, PackedRows, PackedSequence, SampleId, Turn
from navil_megatron.hf.remote_code.processing_navil_chat import NaViLImageProcessor
from tests.ranks import tiny_config

COLOURS = [colour for _, colour in KINDS]
BOUNDS = {"min_pixels": 32 * 32, "max_pixels": 128 * 128}


class Example(NamedTuple):
    rows: list[PackedSequence]
    microbatch: Microbatch
    tokenizer: SampleTokenizer

    def shown(self) -> list[ShownRow]:
        names = {sample: f"sample {sample.number}" for sample in self.microbatch.samples}
        return shown_rows(self.rows, self.microbatch, self.tokenizer, 16, 2, names)

    def page(self, title: str = "seed 7, step 3") -> str:
        return render_rows(self.shown(), title, 32)

    def kinds(self) -> np.ndarray:
        return token_kinds(self.rows, self.microbatch, self.tokenizer.special_token_ids, 2)


def lay_out(
    tokenizer: SampleTokenizer,
    rows: Sequence[Sequence[tuple[Content, Sequence[Image.Image]]]],
    seq_length: int,
    **bounds: int,
) -> Example:
    """Rows of samples with 16 tokens of visual padding each, then text padding."""
    planner = ImagePlanner(patch_size=16, merge_size=2, multi_scale=True, scale_ratio=0.7071, **bounds)
    processor = NaViLImageProcessor(**bounds)
    packed, ids, weights, visual, starts, lengths, segments = [], [], [], [], [], [], []
    for row_number, row in enumerate(rows):
        samples, used = [], 0
        for content, images in row:
            scales = planner.plan_images([(image.height, image.width) for image in images])
            sample = encode_sample(SampleId(row_number, len(starts)), content, scales, tokenizer, 2)
            samples.append(sample)
            starts.append(row_number * seq_length + used)
            lengths.append(len(sample.input_ids))
            used += lengths[-1]
            ids.append(sample.input_ids)
            weights.append([*sample.loss_weights[1:], 0.0])
            visual.append(visual_tokens(sample.input_ids, tokenizer.special_token_ids))
        assert used + 16 <= seq_length, used
        ids.append(np.full(seq_length - used, tokenizer.pad_id))
        weights.append(np.zeros(seq_length - used))
        visual.append(np.arange(seq_length - used) < 16)
        segments += [len(sample.input_ids) for sample in samples] + [16, seq_length - used - 16]
        packed.append(PackedSequence(tuple(samples), seq_length))
    pictures = [image for row in rows for _, images in row for image in images]
    grids = image_grid_thw([scales for row in packed for sample in row.samples for scales in sample.scales])
    pixels = processor.preprocess(pictures)["pixel_values"] if pictures else torch.empty(0, 3 * 256)
    packed_rows = PackedRows(
        input_ids=np.concatenate(ids),
        position_ids=np.concatenate([np.arange(length) for length in segments]),
        labels=np.full(len(rows) * seq_length, -100),  # not drawn
        loss_weights=np.concatenate(weights).astype(np.float32),
        visual_token_mask=np.concatenate(visual),
        segment_lengths=tuple(segments),
        image_grid_thw=grids,
        samples=tuple(sample.sample for row in packed for sample in row.samples),
        sample_starts=tuple(starts),
        sample_lengths=tuple(lengths),
    )
    model = dataclasses.replace(tiny_config().model, special_token_ids=tokenizer.special_token_ids)
    return Example(packed, plan_microbatch(packed_rows, model, ALONE, levels(pixels)), tokenizer)


def levels(patches: torch.Tensor) -> torch.Tensor:
    """[p, 3 * patch * patch] uint8 of normalised patches."""
    return ((patches.flatten(1) + 1) * 127.5).round().to(torch.uint8)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    tokenizer = build_tokenizer(["a red apple left of a key"] * 3, tmp_path_factory.mktemp("tokenizer"))
    chat = (Turn("user", (None, "a key", None)), Turn("assistant", ("a red apple",)), Turn("user", ("a",)))
    rows = [[("a red apple", [noise(120, 100)]), ("left of a key", [])], [(chat, [noise(40, 64), noise(64, 30)])]]
    return lay_out(tokenizer, rows, 192, **BOUNDS)


def test_every_token_has_its_kind(example: Example) -> None:
    kinds, tokenizer = example.kinds(), example.tokenizer
    assert len(kinds) == 2 * 192
    scales = [len(image) for row in example.rows for sample in row.samples for image in sample.scales]
    num_context = [scale.grid_height * scale.grid_width // 4 for scale in example.rows[0].samples[0].scales[0]]
    assert scales == [5, 1, 1]
    first = kinds[: example.microbatch.sample_lengths[0]]
    assert [np.count_nonzero(first == TokenKind.FIRST_SCALE + n) for n in range(5)] == num_context
    assert first[0] == first[-len(tokenizer.encode("a red apple")) - 2] == TokenKind.IMAGE_END
    assert np.count_nonzero(kinds == TokenKind.IMAGE_END) == 2 * len(scales)
    assert np.count_nonzero(kinds == TokenKind.FRAME_BREAK) == sum(scales)
    said = ["a red apple", "left of a key", "a red apple"]
    assert np.count_nonzero(kinds == TokenKind.LEARNED) == sum(len(tokenizer.encode(text)) + 1 for text in said) - 1
    assert np.count_nonzero(kinds == TokenKind.VISUAL_PADDING) == 32
    scale_tokens = (kinds >= TokenKind.FIRST_SCALE) & (kinds <= TokenKind.LAST_SCALE)
    assert np.count_nonzero(scale_tokens) + 3 + 32 == example.microbatch.visual_token_mask.sum()


def test_cells_have_the_share_of_their_tokens(example: Example) -> None:
    kinds = example.kinds()
    weights = example.microbatch.loss_weights.copy()
    weights[weights > 0] = np.resize([0.5, 1.0], np.count_nonzero(weights))
    picture = np.asarray(draw_cells(kinds, weights, 4, 1.0))
    assert picture.shape[1] == 4 * len(kinds)
    colours, counts = np.unique(picture[:CELL_HEIGHT].reshape(-1, 3), axis=0, return_counts=True)
    found = {tuple(colour): count for colour, count in zip(colours.tolist(), counts.tolist(), strict=True)}
    assert found == {COLOURS[kind]: CELL_HEIGHT * 4 * np.count_nonzero(kinds == kind) for kind in np.unique(kinds)}
    bars = (picture[CELL_HEIGHT + 2 :] == (18, 96, 64)).all(axis=2).sum(axis=0)
    assert np.array_equal(bars, np.repeat(weights * 8, 4))


def pictures_of(page: str, kind: str) -> list[np.ndarray]:
    found = re.findall(rf'src="data:image/{kind};base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) for content in found]


def test_page_and_picture_hold_every_cell_and_are_the_same_every_time(example: Example) -> None:
    page, kinds, cell = example.page(), example.kinds(), LINE_WIDTH // 192
    assert page == example.page() != example.page("seed 7, step 4")
    picture = draw_rows(example.shown(), "seed 7, step 3")
    assert picture.tobytes() == draw_rows(example.shown(), "seed 7, step 3").tobytes()
    assert picture.tobytes() != draw_rows(example.shown(), "seed 7, step 4").tobytes()
    lines = pictures_of(page, "png")
    assert len(lines) == 2
    for row, cells in enumerate(lines):
        of_row = slice(row * 192, (row + 1) * 192)
        expected = draw_cells(kinds[of_row], example.microbatch.loss_weights[of_row], cell, 1.0)
        assert np.array_equal(cells, expected)
        stands = (np.asarray(picture)[:, 12 : 12 + expected.width] == cells[CELL_HEIGHT - 1]).all(axis=(1, 2))
        assert stands.sum() >= 3  # numbers of samples are written on the cells above
    assert [scale.shape[:2] for scale in pictures_of(page, "jpeg")] == [
        (height * 16, width * 16) for _, height, width in example.microbatch.image_grid_thw
    ]
    for row, counts in enumerate(shown.counts for shown in example.shown()):
        assert counts == {kind: np.count_nonzero(kinds[row * 192 : (row + 1) * 192] == kind) for kind in counts}


def text_of(page: str, sample: int) -> str:
    return re.findall(r'<p class="text">(.*?)</p>', page, re.S)[sample - 1]


def test_texts_of_every_script_are_shown_with_what_is_learned(example: Example) -> None:
    captions = ["一只红狐狸 🦊👨‍👩‍👧", "تفاحة خضراء (3)", "no <|im_end|> & no <b>"]
    chat = (Turn("user", (None, "红 or أخضر?")), Turn("assistant", ("🦊 أخضر",)))
    rows = [[(captions[0], []), (captions[1], [noise(64, 64)]), (captions[2], []), (chat, [noise(64, 64)])]]
    page = lay_out(example.tokenizer, rows, 512, **BOUNDS).page()
    end, image = '<mark><b dir="ltr">&lt;|im_end|&gt;</b></mark>', '<b dir="ltr">image</b>'
    assert text_of(page, 1) == f"<mark>{captions[0]}</mark>{end}"
    assert text_of(page, 2) == f"{image}<mark>{captions[1]}</mark>{end}"
    assert text_of(page, 3) == f"<mark>no &lt;|im_end|&gt; &amp; no &lt;b&gt;</mark>{end}"
    asked = f'<b dir="ltr">&lt;|im_start|&gt;</b>user\n{image}\n红 or أخضر?'
    header = '<b dir="ltr">&lt;|im_end|&gt;&lt;|im_start|&gt;</b>assistant\n'
    assert text_of(page, 4) == f"{asked}{header}<mark>🦊 أخضر</mark>{end}"


def test_long_rows_wrap_and_absent_pixels_are_grey(example: Example) -> None:
    long = lay_out(example.tokenizer, [[("a red apple " * 700, [noise(90, 90)]), ("a key " * 200, [])]], 4096, **BOUNDS)
    page = long.page()
    lines = pictures_of(page, "png")
    assert len(lines) > 5 and all(line.shape[1] <= LINE_WIDTH for line in lines)
    learned = sum((line == COLOURS[TokenKind.LEARNED]).all(axis=2).sum() for line in lines)
    assert learned == np.count_nonzero(long.kinds() == TokenKind.LEARNED) * 3 * CELL_HEIGHT
    bare = long._replace(microbatch=dataclasses.replace(long.microbatch, pixel_values=None))
    assert all(len(np.unique(scale)) <= 12 for scale in pictures_of(bare.page(), "jpeg"))
    assert draw_rows(bare.shown(), "").width <= 2400


def test_unpatchify_gives_the_padded_picture_back() -> None:
    picture = noise(50, 90)
    processor = NaViLImageProcessor(min_pixels=1024, multi_scale=False)
    patches = processor.preprocess([picture])["pixel_values"]
    pixels = unpatchify(levels(patches), 4, 6, 16, 2)
    assert (pixels.shape, pixels.dtype) == ((64, 96, 3), np.uint8)
    assert np.array_equal(pixels[:50, :90], np.asarray(picture))
    assert not pixels[50:].any()
    assert not pixels[:, 90:].any()
