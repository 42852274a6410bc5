"""What a sample looks like to a model: the images as a caption's start, or a question in a user's turn."""

from collections.abc import Sequence
from typing import Any, Literal

from navil_megatron.blueprint.chat_template import PLACEHOLDER
from navil_megatron.config.errors import UserError
from navil_megatron.evaluation.samples import Sample
from navil_megatron.hf.generate import as_text

PromptStyle = Literal["auto", "plain", "chat"]
"""``auto``: a question becomes a turn where the model knows turns; what has no question is never one."""


def prompt_of(sample: Sample, processor: Any, style: PromptStyle) -> str:
    """The prompt with an ``<image>`` for each image; errors as of ``write_prompt``."""
    style = "plain" if style == "auto" and not sample.question else style
    return write_prompt([{"role": "user", "content": content_of(sample)}], processor, style)


def write_prompt(messages: Sequence[dict[str, Any]], processor: Any, style: PromptStyle) -> str:
    """The prompt for the next turn, with an ``<image>`` for each image; ``plain`` strings images and text together.

    Raises:
        UserError: Turns are asked for and the folder has no chat template.
    """
    knows_turns = bool(getattr(processor, "chat_template", None))
    if style == "chat" and not knows_turns:
        raise UserError("the folder has no chat template: ask with --prompts plain")
    if style == "plain" or not knows_turns:
        parts = (part for message in messages for part in message["content"])
        return "".join(as_text(processor, part["text"]) if "text" in part else PLACEHOLDER for part in parts)
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def content_of(sample: Sample) -> list[dict[str, str]]:
    """Images and text as the parts of a turn; images that the question does not place come first."""
    question = sample.question or ""
    if PLACEHOLDER not in question:
        question = PLACEHOLDER * len(sample.images) + question
    first, *others = question.split(PLACEHOLDER)
    parts = [{"type": "text", "text": first}]
    for text in others:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return [part for part in parts if part.get("text") != ""]
