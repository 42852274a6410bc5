"""A JSON array of objects, as LLaVA has its lists, read entry by entry: such files hold gigabytes."""

import codecs
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_MAX_ENTRY = 2**24  # characters; no entry that is longer fits a row
_CHARACTERS_AT_ONCE = 2**20
_BETWEEN = re.compile(r"[\s,]*")


class NoArrayError(Exception):
    """The file is no JSON array of objects; the message says where."""


def starts_array(path: Path) -> bool:
    """Whether a ``.json`` or ``.json.gz`` file begins as an array does."""
    if ".json" not in path.suffixes[-2:]:
        return False
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return bytes(file.read(4096)).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def array_entries(file: IO[bytes]) -> Iterator[bytes]:
    """Every entry as a line of JSON; NoArrayError: what follows is none."""
    reader = codecs.getreader("utf-8-sig")(file)
    decode = json.JSONDecoder().raw_decode
    rest, number, is_open = "", 0, False
    try:
        while True:
            block = reader.read(_CHARACTERS_AT_ONCE)
            rest += block
            place = 0
            while True:
                if not is_open:
                    place = len(rest) - len(rest.lstrip()) + 1
                    is_open = True
                start = _between(rest, place)
                if rest[start : start + 1] in ("", "]"):
                    place = start
                    break
                try:
                    entry, place = decode(rest, start)
                except ValueError:
                    if not block or len(rest) - start > _MAX_ENTRY:
                        raise NoArrayError(f"entry {number + 1} of its array is not JSON, or cut") from None
                    place = start
                    break
                number += 1
                yield json.dumps(entry).encode()
            rest = rest[place:]
            if rest[:1] == "]":
                if rest[1:].strip() or reader.read(_CHARACTERS_AT_ONCE).strip():
                    raise NoArrayError("more follows the end of its array")
                return
            if not block:
                raise NoArrayError(f"its array ends early, behind entry {number}")
    except UnicodeDecodeError:
        raise NoArrayError(f"it is not UTF-8 behind entry {number}") from None
    except RecursionError:
        raise NoArrayError(f"entry {number + 1} of its array is nested too deeply") from None


def _between(text: str, place: int) -> int:
    match = _BETWEEN.match(text, place)
    return match.end() if match else place
