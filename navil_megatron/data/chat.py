"""How a sample reads: images and text in order, turn by turn, before any of it is a token.

The reference's prompt (MPT style): turns follow each other without a newline, images that begin a turn stand on a line
each, later ones stand where they are. The exported processor writes the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from navil_megatron.data.types import Turn

START_TOKEN = "<|im_start|>"
END_TOKEN = "<|im_end|>"

EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
"""What every answer follows in the chats of a tokenizer that knows thoughts (Qwen3), as in the authors' 9B."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set turn = namespace(leading=true) %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{% set turn.leading = false %}{{ part['text'] }}"
    "{% elif turn.leading %}<image>\n{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The same for transformers, with ``<image>`` where an image stands."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a sample that is tokenised as one string, or an image."""

    text: str = ""
    opens: bool = False
    """The token that starts a turn comes before the text."""
    closes: bool = False
    """The token that ends a turn, or a document, comes after it."""
    loss: bool = False
    """The model learns to say it."""
    image: bool = False


IMAGE = Span(image=True)


def document_spans(text: str, num_images: int) -> list[Span]:
    """Images, then the text, which is learned with its end."""
    return [IMAGE] * num_images + [Span(text, closes=True, loss=True)]


def conversation_spans(turns: tuple[Turn, ...], answer_start: str) -> Iterator[Span]:
    """Turn by turn; what the assistant says is learned with its end, and cut off from the header before it.

    At inference the header ends the prompt, so the tokens of an answer must not depend on it.

    Args:
        turns: the conversation.
        answer_start: text between the header of an assistant's turn and what is said.
    """
    for turn in turns:
        if turn.role == "assistant":
            yield Span(f"assistant\n{answer_start}", opens=True)
            yield Span("".join(part for part in turn.parts if part is not None), closes=True, loss=True)
        else:
            yield from _prompt_spans(turn)


def _prompt_spans(turn: Turn) -> Iterator[Span]:
    """A turn that is not learned, cut where images stand."""
    text, opens, leading = f"{turn.role}\n", True, True
    for part in turn.parts:
        if part is None:
            yield Span(text, opens=opens)
            yield IMAGE
            text, opens = "\n" if leading else "", False
        else:
            text, leading = text + part, False
    yield Span(text, opens=opens, closes=True)
