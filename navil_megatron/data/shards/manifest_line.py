"""One line of a manifest: which keys it may have, by which names the user has them, and the sample that it makes."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from navil_megatron.config.errors import UserError
from navil_megatron.data.content import CONTENT_KEYS, RejectedSample, is_given, listed_parts, require_text

SAMPLE_KEYS = ("image", "images", *CONTENT_KEYS, "image_info")
"""What a line says something under."""
_BESIDE = ("id", "width", "height", "model", "source", "metadata", "general_metadata", "similarity_matrix")
_BESIDE_MMC4 = ("url", "could_have_url_duplicate", "face_detections")
"""What LLaVA, OBELICS and MMC4 write beside a sample; it is no part of one."""


class UnknownKeyError(Exception):
    """A key that a line may not have; the message says what to do."""


class Line(NamedTuple):
    """A sample before its pictures are read."""

    images: list[Any]  # as the manifest has them: paths, addresses or bytes, in the order of the sample
    extension: str  # of the text member
    text: bytes


@dataclass(frozen=True, slots=True)
class Keys:
    """The user's names of keys."""

    names: tuple[tuple[str, str], ...] = ()
    """Our name, theirs."""
    ignored: tuple[str, ...] = ()
    """Theirs."""

    @classmethod
    def parse(cls, renamed: Sequence[str] = (), ignored: Sequence[str] = ()) -> "Keys":
        """From ``image=img_path,caption=text`` and ``id,url``; UserError where that is no list of keys."""
        pairs = [tuple(pair.strip().split("=")) for some in renamed for pair in some.split(",")]
        for pair in pairs:
            if len(pair) != 2 or pair[0] not in SAMPLE_KEYS or not pair[1]:
                raise UserError(f"--map {'='.join(pair)}: expected OURS=YOURS, ours one of {', '.join(SAMPLE_KEYS)}")
        ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
        if len({*ours}) != len(ours) or len({*theirs}) != len(theirs):
            raise UserError(f"--map {','.join(map('='.join, pairs))}: a key is named twice")
        names = [name.strip() for some in ignored for name in some.split(",")]
        return cls(tuple((pair[0], pair[1]) for pair in pairs), tuple(names))

    def rename(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What a line says under our names; keys without a value, and what is no part of a sample, are gone.

        Raises:
            UnknownKeyError: a key that is not known, or two of one name.
        """
        ours = {theirs: our for our, theirs in self.names}
        named: dict[str, Any] = {}
        for theirs, value in fields.items():
            name = ours.get(theirs, theirs)
            beside = _BESIDE + (_BESIDE_MMC4 if "text_list" in fields else ())
            if not is_given(value) or theirs in self.ignored or name in beside:
                continue
            if name not in SAMPLE_KEYS:
                raise UnknownKeyError(_unknown(name))
            if name in named:
                raise UnknownKeyError(f"{name!r} stands there twice under --map: give --ignore for one of both")
            named[name] = value
        return named


def _unknown(name: str) -> str:
    name = name if len(name) <= 60 else f"{name[:57]}..."
    near = difflib.get_close_matches(name, SAMPLE_KEYS, n=1)
    nearest = f"the nearest is {near[0]!r}" if near else f"keys are {', '.join(SAMPLE_KEYS)}"
    ours = near[0] if near else "image"
    return f"{name!r} is not a key of a sample; {nearest}: give --map {ours}={name}, or --ignore {name}"


def read_line(fields: Mapping[str, Any]) -> Line:
    """The sample of a line under our names; RejectedSample: it says nothing, or two things at once."""
    names = [name for name in CONTENT_KEYS if name in fields]
    if not names:
        raise RejectedSample("line without a caption")
    if len(names) > 1 or ("image" in fields and "images" in fields):
        raise RejectedSample(f"{' and '.join(names) if len(names) > 1 else 'image and images'} in one line")
    (name,) = names
    found = fields.get("image", fields.get("images"))
    images = [image for image in (found if isinstance(found, list) else [found]) if is_given(image)]
    try:
        if name in ("caption", "text"):
            return Line(images, "txt", require_text(name, fields[name]).encode())
        if name in ("conversations", "messages"):
            return Line(images, "json", _dump(name, fields[name]))
        parts, order = listed_parts(fields)
        if name == "text_list":
            images = [info.get("image_name") for info in fields.get("image_info") or []]
        if order is not None and len(order) != len(images):
            raise RejectedSample("image marks and images differ in number")
        return Line(images if order is None else [images[number] for number in order], "json", _dump("texts", parts))
    except UnicodeEncodeError:
        raise RejectedSample("text is not Unicode") from None


def _dump(name: str, value: Any) -> bytes:
    return json.dumps({name: value}, ensure_ascii=False, separators=(",", ":")).encode()
