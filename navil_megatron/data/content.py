"""What the text member of a sample says: a caption, a document with images in it, or a conversation.

One parser for the index and for reading, so that both see the same sample. A document is plain text, JSON with a
``caption`` or ``text``, or JSON with the lists of OBELICS (``texts``, beside ``images``) or MMC4 (``text_list``, beside
``image_info``); a conversation is JSON with ``conversations`` (LLaVA, InternVL) or ``messages`` (OpenAI). ``null`` and
an empty text say as little as no key at all.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

from navil_megatron.blueprint.chat_template import PLACEHOLDER
from navil_megatron.data.shards.shard_index import (
    KIND_CONVERSATION,
    KIND_INTERLEAVED_JSON,
    KIND_INTERLEAVED_TEXT,
    KIND_JSON,
    KIND_TEXT,
)
from navil_megatron.data.types import Content, Document, Turn

_ROLES: dict[Any, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_CONVERSATIONS = {"conversations": ("from", "value"), "messages": ("role", "content")}
_LISTS = ("texts", "text_list")
_TEXTS = ("caption", "text")
CONTENT_KEYS = (*_CONVERSATIONS, *_LISTS, *_TEXTS)
"""What a sample may say something under."""
_TYPES: dict[type, str] = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
_PARAGRAPHS = "\n\n"  # between texts of a list with no image between them
_SENTENCES = " "  # the same in MMC4, whose texts are sentences
_DIFFER = "image marks and images differ in number"


class RejectedSample(Exception):
    """A sample that cannot be trained on; the message is the reason, short enough to count by."""


class NoCaptionError(RejectedSample):
    """There is no caption here; another member may have it."""


def parse_content(member: bytes, is_json: bool, num_images: int, *, has_marks: bool = True) -> tuple[int, Content]:
    """(kind, content) of a text member; a document comes without the white space around it.

    Without ``has_marks``, as indexes of before have it, ``<image>`` in a caption is text like any other.

    Raises:
        RejectedSample: it says nothing that can be trained on, or does not fit the number of images.
    """
    try:
        text = member.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RejectedSample("text is not UTF-8") from None
    if not is_json:
        content = _marked_text(text, num_images, has_marks)
        return KIND_TEXT if isinstance(content, str) else KIND_INTERLEAVED_TEXT, content
    try:
        fields = json.loads(text)
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # "\ud800" is JSON, but no character
        raise RejectedSample("text is not Unicode") from None
    except (ValueError, RecursionError):
        raise RejectedSample("text is not JSON") from None
    name = next((name for name in CONTENT_KEYS if is_given(fields.get(name))), None) if _is_object(fields) else None
    if name is None:
        blank = _is_object(fields) and any(fields.get(name) == "" for name in _TEXTS)
        raise NoCaptionError("empty caption" if blank else "JSON without a caption")
    if name in _CONVERSATIONS:
        return KIND_CONVERSATION, _conversation(fields[name], *_CONVERSATIONS[name], num_images)
    content = _listed(fields, num_images) if name in _LISTS else _captioned(fields, name, num_images, has_marks)
    return KIND_JSON if isinstance(content, str) else KIND_INTERLEAVED_JSON, content


def dump_content(content: Content) -> tuple[str, bytes]:
    """(extension, bytes) of a text member that parses to this content."""
    if isinstance(content, str) and PLACEHOLDER not in content:
        return "txt", content.encode()
    if isinstance(content, str | Document):
        return "json", _dump({"texts": [content] if isinstance(content, str) else content.parts})
    messages = []
    for turn in content:
        parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.parts]
        messages.append({"role": turn.role, "content": parts})
    return "json", _dump({"messages": messages})


def _dump(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def is_given(value: Any) -> bool:
    """Whether the value of a key says anything: tables are exported with ``null`` or nothing in every empty cell."""
    return value is not None and value != ""


def require_text(name: str, value: Any) -> str:
    """The value of a key; RejectedSample where it is no text."""
    if not isinstance(value, str):
        raise NoCaptionError(f"{name} is {_TYPES.get(type(value), 'no text')}, expected a text")
    return value


def _is_object(fields: Any) -> bool:
    return isinstance(fields, dict)


def _captioned(fields: Mapping[str, Any], name: str, num_images: int, has_marks: bool) -> str | Document:
    return _marked_text(require_text(name, fields[name]), num_images, has_marks)


def _marked_text(text: str, num_images: int, has_marks: bool) -> str | Document:
    """A text whose marks say where its images stand."""
    text = _document(text)
    first, *others = text.split(PLACEHOLDER) if has_marks else [text]
    if not others:
        return text
    parts: list[str | None] = [first]
    for other in others:
        parts += [None, other]
    return _interleaved(parts, num_images)


def _listed(fields: Mapping[str, Any], num_images: int) -> str | Document:
    """A document as lists; images come first where nothing says where they stand."""
    parts, order = listed_parts(fields)
    if order is None:
        return _document("".join(part or "" for part in parts))
    if order != sorted(order):
        raise RejectedSample("image_info is not in the order of its texts")
    return _interleaved(parts, num_images)


def listed_parts(fields: Mapping[str, Any]) -> tuple[list[str | None], list[int] | None]:
    """Texts with ``None`` where an image stands, and which image stands first, second, ..., if anything says so.

    OBELICS' ``texts`` has ``null`` where an image stands, MMC4's ``image_info`` says which text an image stands before.
    RejectedSample: they say it wrongly.
    """
    if is_given(fields.get("texts")):
        images, joint = fields.get("images"), _PARAGRAPHS
        parts = _obelics_parts(fields["texts"], images)
        order = list(range(parts.count(None)))
    else:
        images, joint = fields.get("image_info") or [], _SENTENCES
        parts, order = _mmc4_parts(fields["text_list"], images)
    joined: list[str | None] = []
    for part in parts:
        if part and joined and joined[-1]:
            joined[-1] += joint + part
        elif part != "":
            joined.append(part)
    return joined, order if order or images is not None else None


def _obelics_parts(texts: Any, images: Any) -> list[str | None]:
    """``texts`` and ``images`` are equally long and hold one of both at a place; or ``texts`` alone says where."""
    if not isinstance(texts, list) or not isinstance(images, list | None):
        raise RejectedSample("texts or images is no list")
    if images is None or texts.count(None) == len(images) != len(texts):
        return [None if text is None else require_text("a text of texts", text) for text in texts]
    if len(images) != len(texts):
        raise RejectedSample("texts and images differ in length")
    places = list(zip(map(is_given, images), texts, strict=True))
    if any(has_image and is_given(text) for has_image, text in places):
        raise RejectedSample("a text and an image in one place")
    return [None if has_image else require_text("a text of texts", text or "") for has_image, text in places]


def _is_mmc4(info: Any) -> bool:
    return isinstance(info, dict) and isinstance(info.get("matched_text_index"), int)


def _mmc4_parts(texts: Any, images: Any) -> tuple[list[str | None], list[int]]:
    if not isinstance(texts, list) or not isinstance(images, list) or not all(map(_is_mmc4, images)):
        raise RejectedSample("text_list or image_info is not as in MMC4")
    places = [int(info["matched_text_index"]) for info in images]
    if not all(0 <= place < len(texts) for place in places):
        raise RejectedSample("matched_text_index is of no text")
    parts: list[str | None] = []
    for number, text in enumerate(texts):
        parts += [None] * places.count(number)
        parts.append(require_text("a text of text_list", text))
    return parts, sorted(range(len(places)), key=places.__getitem__)


def _interleaved(parts: list[str | None], num_images: int) -> str | Document:
    """Checked, without the white space around it; a text where there is no image."""
    if not any(part and part.strip() for part in parts):
        raise NoCaptionError("empty caption")
    if parts.count(None) != num_images:
        raise RejectedSample(_DIFFER)
    if parts[0] is not None:
        parts[0] = parts[0].lstrip()
    if parts[-1] is not None:
        parts[-1] = parts[-1].rstrip()
    found = tuple(part for part in parts if part != "")
    return Document(found) if None in found else "".join(part or "" for part in found)


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
        raise RejectedSample(_DIFFER)
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
