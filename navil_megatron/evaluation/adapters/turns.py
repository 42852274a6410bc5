"""Answers to conversations with pictures, for any toolkit: messages in, texts out.

A message is ``{"role", "content"}``; its content is a list of ``{"type": "text", "text"}`` and
``{"type": "image", "image": picture or path}``.
"""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from navil_megatron.blueprint.chat_template import PLACEHOLDER
from navil_megatron.config.errors import UserError
from navil_megatron.evaluation.prompts import PromptStyle, write_prompt
from navil_megatron.hf.generate import Captioner, generate_texts, open_picture

type Chat = Sequence[dict[str, Any]]


def answer_chats(
    captioner: Captioner, chats: Sequence[Chat], max_new_tokens: int, style: PromptStyle = "auto"
) -> list[str]:
    """The next turn of each conversation, by greedy decoding of one batch.

    ``plain`` gives images and text one after another, without turns: for a model of a phase that has not seen turns
    yet, and what ``auto`` does where the folder has no chat template.

    Raises:
        UserError: A part is neither text nor picture, or a picture cannot be read.
    """
    split = [_split(chat) for chat in chats]
    prompts = [write_prompt(messages, captioner.processor, style) for messages, _ in split]
    texts = generate_texts(captioner, [pictures for _, pictures in split], prompts, max_new_tokens)
    return [text.strip() for text in texts]


def _split(chat: Chat) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Messages whose images are marks alone, and the pictures in order."""
    messages, pictures = [], []
    for message in chat:
        parts: list[dict[str, str]] = []
        for part in message["content"]:
            if part["type"] == "text":
                # A mark in a question of others is no picture of ours.
                parts.append({"type": "text", "text": part["text"].replace(PLACEHOLDER, "")})
            elif part["type"] == "image":
                parts.append({"type": "image"})
                picture = part["image"]
                pictures.append(picture.convert("RGB") if isinstance(picture, Image.Image) else open_picture(picture))
            else:
                raise UserError(f"NaViL reads text and images, not {part['type']!r}: leave this task out")
        messages.append({"role": message["role"], "content": parts})
    return messages, pictures
