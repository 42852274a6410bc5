"""The rows of an evaluation set: JSON lines, read strictly, every problem named with its file and line.

A row is ``{"id", "images", "question", "answers", "task"}``; docs/evaluation.md has the schema. The captioned images
that ``data build`` takes are rows, too.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from navil_megatron.blueprint.chat_template import PLACEHOLDER
from navil_megatron.config.errors import ConfigError, UserError

MAX_PROBLEMS = 20  # problems that are told one by one
_FIELDS = ("id", "image", "images", "question", "answers", "caption", "task")


@dataclass(frozen=True, slots=True)
class Sample:
    """One thing to ask a model."""

    id: str
    images: tuple[Path, ...]
    question: str | None  # holds no ``<image>``, or one for every image
    answers: tuple[str, ...]  # what would be right: one is enough
    task: Literal["caption", "qa"]


class _Problem(Exception):
    """Why a row cannot be used."""


def read_samples(path: Path) -> list[Sample]:
    """The rows in the order of the file; blank lines are passed over.

    Raises:
        UserError: The file cannot be read or holds no row.
        ConfigError: Rows are wrong; every one is named.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give JSON lines, one sample a line") from None
    samples: list[Sample] = []
    line_of_id: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            sample = _parse(line, number, path.parent)
            if sample.id in line_of_id:
                raise _Problem(f"id {sample.id!r} is that of line {line_of_id[sample.id]}; give every sample its own")
        except _Problem as problem:
            problems.append(f"{path}:{number}: {problem}")
            continue
        line_of_id[sample.id] = number
        samples.append(sample)
    if problems:
        more = len(problems) - MAX_PROBLEMS
        raise ConfigError([*problems[:MAX_PROBLEMS], *([f"{path}: {more} more lines like these"] if more > 0 else [])])
    if not samples:
        raise UserError(f"{path} holds no sample: give JSON lines, one sample a line")
    return samples


def _parse(line: bytes, number: int, folder: Path) -> Sample:
    fields = {name: value for name, value in _json_object(line).items() if value is not None and value != ""}
    unknown = [name for name in fields if name not in _FIELDS]
    if unknown:
        raise _Problem(f"unknown field {unknown[0]!r}, expected {', '.join(_FIELDS)}")
    for one, other in (("image", "images"), ("answers", "caption")):
        if one in fields and other in fields:
            raise _Problem(f"{one!r} and {other!r} say the same thing; keep one")
    images = tuple(_images(fields, folder))
    question = _text(fields, "question")
    task = _task(fields, question)
    if task == "qa" and question is None:
        raise _Problem("a sample of task \"qa\" needs a 'question'")
    if task == "caption" and not images:
        raise _Problem("a caption needs an image: give 'image' or 'images'")
    num_marks = (question or "").count(PLACEHOLDER)
    if num_marks not in (0, len(images)):
        raise _Problem(f"'question' holds {PLACEHOLDER} {num_marks} times for {len(images)} images; mark all or none")
    return Sample(_text(fields, "id") or str(number), images, question, _answers(fields), task)


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeError:  # "\ud800" is JSON, but no character
        raise _Problem("the line is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise _Problem(f"the line is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise _Problem("the line is not a JSON object")
    return fields


def _images(fields: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Image files, relative to the file that names them."""
    named = fields.get("image", fields.get("images", []))
    for name in named if isinstance(named, list) else [named]:
        if not isinstance(name, str) or not name:
            raise _Problem(f"an image is {name!r}, expected the path of a file")
        if not (folder / name).is_file():
            raise _Problem(f"image {folder / name} is no file")
        yield folder / name


def _answers(fields: dict[str, Any]) -> tuple[str, ...]:
    caption = _text(fields, "caption")
    answers = fields.get("answers") if caption is None else [_without_marks(caption)]
    if not isinstance(answers, list) or not answers:
        raise _Problem("'answers' is missing, expected a list of one or more texts")
    for answer in answers:
        if not isinstance(answer, str) or not answer.strip():
            raise _Problem(f"an answer is {answer!r}, expected a text")
    return tuple(answers)


def _without_marks(caption: str) -> str:
    """What is to be said where the images come first."""
    said = caption.strip()
    while said.startswith(PLACEHOLDER):
        said = said.removeprefix(PLACEHOLDER).lstrip()
    if PLACEHOLDER in said:
        raise _Problem(f"'caption' holds {PLACEHOLDER} behind text; ask a 'question' about interleaved documents")
    return said


def _task(fields: dict[str, Any], question: str | None) -> Literal["caption", "qa"]:
    named = fields.get("task")
    if named not in (None, "caption", "qa"):
        raise _Problem(f'\'task\' is {named!r}, expected "caption" or "qa"')
    return "caption" if named == "caption" or (named is None and question is None) else "qa"


def _text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise _Problem(f"{name!r} is {value!r}, expected a text")
    return value
