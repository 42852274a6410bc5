"""What a model answered: JSON lines that grow batch by batch, each marked with what it depends on.

A run that was killed goes on behind the last whole line. Lines of another model, other data or other settings are
refused, so that one file never mixes two.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from navil_megatron.config.errors import UserError
from navil_megatron.files.atomic_file import append
from navil_megatron.files.hashes import digest_of_files

MARKS = ("model", "data", "settings")  # what all lines of a file share, each as a hash


class Predictions:
    """The file of predictions of one run: sample id -> answer."""

    def __init__(self, path: Path, marks: Mapping[str, str]) -> None:
        """Reads what is there, but a torn last line; UserError: lines are damaged, or not of these marks."""
        self.path, self._marks = path, {name: marks[name] for name in MARKS}
        self._text_of: dict[str, tuple[str, str]] = {}
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            self._read(line, number)
        if len(whole) < len(content):
            os.truncate(path, len(whole))

    def get(self, sample_id: str, pictures: str) -> str | None:
        """The answer to a sample, if there is one; UserError where it was given for other pictures."""
        text, seen = self._text_of.get(sample_id, (None, None))
        if text is not None and seen != pictures:
            raise UserError(
                f"{self.path} holds an answer to {sample_id!r} for other pictures than those that lie there now: "
                "give another --output, or delete the file"
            )
        return text

    def add(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """Appends (sample id, hash of its pictures, answer); on disk when this returns."""
        rows = list(rows)
        lines = [
            json.dumps({"id": sample_id, "text": text, "pictures": pictures, **self._marks}, ensure_ascii=False)
            for sample_id, pictures, text in rows
        ]
        append(self.path, "".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
        self._text_of |= {sample_id: (text, pictures) for sample_id, pictures, text in rows}

    def _read(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            texts = {name: row[name] for name in ("id", "text", "pictures", *MARKS)}
            if not all(isinstance(text, str) for text in texts.values()):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{self.path}:{number} is damaged: delete the line, or give another --output") from None
        for name in MARKS:
            if texts[name] != self._marks[name]:
                raise UserError(
                    f"{self.path} holds answers of other {name} (found {texts[name]}, expected {self._marks[name]}): "
                    "give another --output, or delete the file"
                )
        self._text_of[texts["id"]] = texts["text"], texts["pictures"]


def digest_of_model(folder: Path) -> str:
    """Hash of what decides the answers of an exported folder: all its files but the README and hidden ones."""
    used = []
    for path in sorted(folder.rglob("*")):
        is_scratch = any(name.startswith((".", "__pycache__")) for name in path.relative_to(folder).parts)
        if path.is_file() and path.name != "README.md" and not is_scratch:
            used.append(path)
    return digest_of_files(used, folder)
