"""How a sample reads: images and text in order, turn by turn, before any of it is a token.

A conversation is cut from the very template that exported folders carry. It is rendered once for each order of roles,
texts and images, with a stand-in for every text, so nothing that a text says can look like a turn or an image.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from jinja2 import Environment

from navil_megatron.blueprint.chat_template import PLACEHOLDER, TURN_TOKENS
from navil_megatron.data.types import Turn


class Span(NamedTuple):
    """A stretch of a sample that is tokenised as one string, or stands for something else."""

    kind: Literal["text", "image", "turn_start", "turn_end", "end"]
    text: str = ""
    learned: bool = False  # the model learns to say it


_KINDS: dict[str, Literal["image", "turn_start", "turn_end"]] = {
    PLACEHOLDER: "image",
    TURN_TOKENS[0]: "turn_start",
    TURN_TOKENS[1]: "turn_end",
}
_TEXT, _ANSWER = "\ufdd0", "\ufdd1"
"""Stand for a text while the template is rendered; the second for one that is learned."""
_CUTS = re.compile(f"({'|'.join(map(re.escape, _KINDS))}|{_ANSWER})")
_compiled = lru_cache(Environment(trim_blocks=True, lstrip_blocks=True).from_string)  # as transformers does


def document_spans(parts: Sequence[str | None]) -> list[Span]:
    """Texts, ``None`` where an image stands, and the end; all that is no image is learned.

    Exported processors read the same tokens out of the texts with ``PLACEHOLDER`` for every image.
    """
    spans = [Span("image") if part is None else Span("text", part, learned=True) for part in parts]
    return [*spans, Span("end", learned=True)]


def conversation_spans(turns: Sequence[Turn], template: str) -> Iterator[Span]:
    """Turn by turn; what the assistant says is learned with its end, and cut off from the header before it.

    At inference the header ends the prompt, so the tokens of an answer must not depend on it.
    """
    contents = [(turn.role, _ANSWER if turn.role == "assistant" else _TEXT, _parts(turn)) for turn in turns]
    shape = tuple((role, *(None if part is None else text for part in parts)) for role, text, parts in contents)
    texts = (part for *_, parts in contents for part in parts if part is not None)
    for span in _laid_out(template, shape):
        yield span._replace(text=re.sub(f"[{_TEXT}{_ANSWER}]", lambda _: next(texts), span.text))


def _parts(turn: Turn) -> list[str | None]:
    """Texts that say something, and ``None`` where an image stands; an answer is one text."""
    parts = [part for part in turn.parts if part != ""]
    return ["".join(part or "" for part in parts)] if turn.role == "assistant" else parts


@lru_cache(maxsize=4096)
def _laid_out(template: str, shape: tuple[tuple[str | None, ...], ...]) -> tuple[Span, ...]:
    """The spans of all conversations of one shape: of each turn the role, and a stand-in for every text."""
    messages = [
        {"role": role, "content": [{"type": "text" if text else "image", "text": text} for text in parts]}
        for role, *parts in shape
    ]
    spans, learned = [], False
    for piece in filter(None, _CUTS.split(_compiled(template).render(messages=messages))):
        learned = piece == _ANSWER or (learned and piece == TURN_TOKENS[1])
        spans.append(Span(_KINDS[piece], learned=learned) if piece in _KINDS else Span("text", piece, learned))
    return tuple(spans)
