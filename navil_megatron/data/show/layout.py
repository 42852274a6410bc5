"""Small pictures put together to a page: text, pictures under each other, pictures side by side that wrap."""

import re
from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

type Colour = tuple[int, int, int]
type TextRun = tuple[str, Colour]

BACKGROUND: Colour = (255, 255, 255)
INK: Colour = (24, 28, 38)
MUTED: Colour = (116, 123, 138)


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, the same on every machine."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    """Pixels that a line of text takes."""
    return round(font(size).getlength(text))


def draw_text(runs: Sequence[TextRun], size: int, width: int = 1760, max_lines: int = 1) -> Image.Image:
    """Coloured text, wrapped at words; what does not fit is left out behind three dots.

    The font knows Latin letters; others show as boxes.
    """
    placed, x, line, is_whole = [], 0, 0, True
    for word, colour in [(word, colour) for text, colour in runs for word in _words(text, size, width)]:
        if word.isspace():
            x += text_width(" ", size) if x else 0
            continue
        room = width - (text_width(" ...", size) if line == max_lines - 1 else 0)
        if x and x + text_width(word, size) > room:
            if line == max_lines - 1:
                is_whole = False
                break
            x, line = 0, line + 1
        placed.append((x, line, word, colour))
        x += text_width(word, size)
    if not is_whole:
        placed.append((x, line, "...", MUTED))
    height = round(size * 1.35)
    right = max((left + text_width(word, size) for left, _, word, _ in placed), default=1)
    picture = Image.new("RGB", (right + 1, height * (line + 1)), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for left, number, word, colour in placed:
        draw.text((left, number * height + round(size * 1.02)), word, fill=colour, font=font(size), anchor="ls")
    return picture


def _words(text: str, size: int, width: int) -> list[str]:
    """Words, control tokens and the spaces between them; a word that could be longer than a line is cut."""
    longest = max(1, width // size)
    words = re.findall(r"\s+|<\|\w+\|>|(?:(?!<\|)\S)+|\S", text)
    return [word[at : at + longest] for word in words for at in range(0, len(word), longest)]


def stack(pictures: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """Pictures under each other, flush left."""
    height = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    page = Image.new("RGB", (max(picture.width for picture in pictures), height), BACKGROUND)
    y = 0
    for picture in pictures:
        page.paste(picture, (0, y))
        y += picture.height + gap
    return page


def flow(pictures: Sequence[Image.Image], width: int, gap: int) -> Image.Image:
    """Pictures side by side, flush top; a line that is full goes on below."""
    lines: list[list[Image.Image]] = [[]]
    for picture in pictures:
        if lines[-1] and sum(other.width + gap for other in lines[-1]) + picture.width > width:
            lines.append([])
        lines[-1].append(picture)
    return stack([_beside(line, gap) for line in lines], gap)


def _beside(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures side by side."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    line = Image.new("RGB", (width, max(picture.height for picture in pictures)), BACKGROUND)
    x = 0
    for picture in pictures:
        line.paste(picture, (x, 0))
        x += picture.width + gap
    return line


def with_margin(picture: Image.Image, margin: int, outline: Colour | None = None) -> Image.Image:
    """A picture with white space around it, in a frame or not."""
    framed = Image.new("RGB", (picture.width + 2 * margin, picture.height + 2 * margin), BACKGROUND)
    framed.paste(picture, (margin, margin))
    if outline is not None:
        ImageDraw.Draw(framed).rectangle((0, 0, framed.width - 1, framed.height - 1), outline=outline)
    return framed


def draw_badge(text: str, fill: Colour) -> Image.Image:
    """A short text in white on a plate."""
    size, width = 13, text_width(text, 13) + 10
    badge = Image.new("RGB", (width, 18), BACKGROUND)
    draw = ImageDraw.Draw(badge)
    draw.rounded_rectangle((0, 0, width - 1, 17), radius=4, fill=fill)
    draw.text((width // 2, 14), text, fill=BACKGROUND, font=font(size), anchor="ms")
    return badge
