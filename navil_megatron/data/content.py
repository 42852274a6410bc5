"""What the text member of a sample says: a caption or document, or a conversation with images in it.

One parser for the index and for reading, so that both see the same sample. A document is plain text or JSON with a
``caption``; a conversation is JSON with ``conversations`` (LLaVA, InternVL) or ``messages`` (OpenAI).
"""

import json
from typing import Any, Literal

from navil_megatron.blueprint.chat_template import PLACEHOLDER
from navil_megatron.data.shards.shard_index import KIND_CONVERSATION, KIND_JSON, KIND_TEXT
from navil_megatron.data.types import Content, Turn

_ROLES: dict[Any, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


class RejectedSample(Exception):
    """A sample that cannot be trained on; the message is the reason, short enough to count by."""


class NoCaptionError(RejectedSample):
    """There is no caption here; another member may have it."""


def parse_content(member: bytes, is_json: bool, num_images: int) -> tuple[int, Content]:
    """(kind, content) of a text member; a document comes without the white space around it.

    Raises:
        RejectedSample: it says nothing that can be trained on, or does not fit the number of images.
    """
    try:
        text = member.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RejectedSample("text is not UTF-8") from None
    if not is_json:
        return KIND_TEXT, _document(text)
    try:
        fields = json.loads(text)
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # "\ud800" is JSON, but no character
        raise RejectedSample("text is not Unicode") from None
    except (ValueError, RecursionError):
        raise RejectedSample("text is not JSON") from None
    if not isinstance(fields, dict):
        raise NoCaptionError("JSON without a caption")
    for name, role_key, text_key in (("conversations", "from", "value"), ("messages", "role", "content")):
        if name in fields:
            return KIND_CONVERSATION, _conversation(fields[name], role_key, text_key, num_images)
    if not isinstance(fields.get("caption"), str):
        raise NoCaptionError("JSON without a caption")
    return KIND_JSON, _document(fields["caption"])


def dump_content(content: Content) -> tuple[str, bytes]:
    """(extension, bytes) of a text member that parses to this content."""
    if isinstance(content, str):
        return "txt", content.encode()
    messages = []
    for turn in content:
        parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.parts]
        messages.append({"role": turn.role, "content": parts})
    return "json", json.dumps({"messages": messages}, ensure_ascii=False, separators=(",", ":")).encode()


def _document(text: str) -> str:
    if not text.strip():
        raise NoCaptionError("empty caption")
    return text.strip()


def _conversation(messages: Any, role_key: str, text_key: str, num_images: int) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RejectedSample("conversation is not a list of turns")
    turns = [_turn(message.get(role_key), message.get(text_key)) for message in messages]
    answers = ["".join(part or "" for part in turn.parts) for turn in turns if turn.role == "assistant"]
    if not answers:
        raise RejectedSample("no assistant turn")
    if not all(answer.strip() for answer in answers):
        raise RejectedSample("empty assistant turn")
    num_marks = sum(turn.parts.count(None) for turn in turns)
    if num_images and not num_marks:
        first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
        if first is None:
            raise RejectedSample("no user turn for the images")
        turns[first] = Turn("user", (None,) * num_images + turns[first].parts)
    elif num_marks != num_images:
        raise RejectedSample("image marks and images differ in number")
    return tuple(turns)


def _turn(name: Any, content: Any) -> Turn:
    """One turn; only a user's turn holds images, elsewhere a mark is plain text."""
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RejectedSample("unknown role")
    if isinstance(content, str):
        parts = _split_at_marks(content) if role == "user" else (content,)
    elif isinstance(content, list):
        parts = tuple(_part(part) for part in content)
    else:
        raise RejectedSample("turn without text")
    if role != "user" and None in parts:
        raise RejectedSample(f"image in a turn of the {role}")
    return Turn(role, tuple(part for part in parts if part != ""))


def _split_at_marks(text: str) -> tuple[str | None, ...]:
    """Text and images; the newline after an image that begins the turn belongs to its mark."""
    first, *others = text.split(PLACEHOLDER)
    parts: list[str | None] = [first]
    leading = not first
    for other in others:
        behind = other.removeprefix("\n") if leading else other
        leading = leading and not behind
        parts += [None, behind]
    return tuple(parts)


def _part(part: Any) -> str | None:
    """One item of a message in OpenAI's manner."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in ("image", "image_url"):
        return None
    raise RejectedSample("unknown part of a turn")
