"""JSON files that hold one object, whatever wrote them."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from navil_megatron.config.errors import UserError


def read_json(path: Path, remedy: str = "give a complete Hugging Face folder") -> dict[str, Any]:
    """The object that a JSON file holds; ``remedy`` is what to tell where there is none.

    Raises:
        UserError: The file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a JSON object: {remedy}")
    return content


@contextmanager
def values_of(path: Path) -> Iterator[None]:
    """Around the use of values from a file that anybody may have written: a wrong one becomes one line.

    Raises:
        UserError: A value has another type than it should, or makes no sense.
    """
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{path} holds a value that is not what it should be ({reason}); correct it") from error


def write_json(path: Path, content: Mapping[str, Any], indent: int = 2) -> None:
    """Writes an object as people read it."""
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
