"""What a sample looks like to a model: the images as a caption's start, or a question in a user's turn."""

from typing import Any, Literal

from navil_megatron.config.errors import UserError
from navil_megatron.evaluation.samples import Sample
from navil_megatron.hf.exported.chat_template import PLACEHOLDER

PromptStyle = Literal["auto", "plain", "chat"]
"""``auto``: a question becomes a turn where the model knows turns; what has no question is never one."""


def prompt_of(sample: Sample, processor: Any, style: PromptStyle) -> str:
    """The prompt with an ``<image>`` for each image.

    Raises:
        UserError: Turns are asked for and the folder has no chat template.
    """
    parts = content_of(sample)
    knows_turns = bool(getattr(processor, "chat_template", None))
    if style == "chat" and not knows_turns:
        raise UserError("the folder has no chat template: ask with --prompts plain")
    if style == "chat" or (style == "auto" and knows_turns and sample.question):
        turns = [{"role": "user", "content": parts}]
        return str(processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    return "".join(part.get("text", PLACEHOLDER) for part in parts)


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
