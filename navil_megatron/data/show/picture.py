"""Packed rows as a picture: bars of tokens and images, without the texts, which take fonts of any script."""

from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw

from navil_megatron.data.show.rows import LINE_WIDTH, ShownRow, ShownSample, size_on_page

_GAP = 12


def draw_rows(rows: Sequence[ShownRow], title: str) -> Image.Image:
    """The picture of some rows, the numbers of samples on their first tokens and on their images."""
    blocks = [_written(Image.new("RGB", (LINE_WIDTH, 28), "white"), [(0, title)], size=20)]
    for row in rows:
        blocks.append(_written(Image.new("RGB", (LINE_WIDTH, 24), "white"), [(0, row.title)], size=16))
        blocks += [_written(cells, [(x, str(number)) for x, number in marks]) for cells, marks in row.lines]
        blocks += [_written(_scales(sample), [(2, str(sample.number))]) for sample in row.samples if sample.images]
    height = sum(block.height + _GAP for block in blocks) + _GAP
    picture, y = Image.new("RGB", (LINE_WIDTH + 2 * _GAP, height), "white"), _GAP
    for block in blocks:
        picture.paste(block, (_GAP, y))
        y += block.height + _GAP
    return picture


def _written(picture: Image.Image, texts: Iterable[tuple[int, str]], size: int = 12) -> Image.Image:
    """A copy with texts at so many pixels from its left."""
    copy = picture.copy()
    for x, text in texts:
        ImageDraw.Draw(copy).text((x + 1, 2), text, "black", font_size=size, stroke_width=2, stroke_fill="white")
    return copy


def _scales(sample: ShownSample) -> Image.Image:
    """The images of a sample at all their scales, side by side, no wider than a line."""
    sizes = [(scale, size_on_page(scale, image[-1])) for image in sample.images for scale in image]
    line, x = Image.new("RGB", (sum(w + 4 for _, (w, _) in sizes), max(h for _, (_, h) in sizes)), "white"), 0
    for scale, size in sizes:
        line.paste(scale.resize(size), (x, 0))
        x += size[0] + 4
    line.thumbnail((LINE_WIDTH, line.height))
    return line
