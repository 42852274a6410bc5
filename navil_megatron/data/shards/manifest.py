"""The lines of a manifest, cut into chunks that are read independently: JSON lines, a JSON array, or rows of tables."""

import gzip
import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from navil_megatron.config.errors import UserError
from navil_megatron.data.content import RejectedSample
from navil_megatron.data.shards.json_array import NoArrayError, array_entries, starts_array
from navil_megatron.data.shards.manifest_line import Keys, Line, UnknownKeyError, read_line
from navil_megatron.data.shards.manifest_table import Table
from navil_megatron.files.atomic_file import new_file

MAX_LINE_BYTES = 2**22
_BYTES_AT_ONCE = 2**24
_LINES_LOOKED_AT = 100  # before anything is written


@dataclass(frozen=True, slots=True)
class LineRange:
    """Lines that one shard is made of."""

    number: int
    first: int
    num_lines: int
    offset: int  # bytes of the JSON lines in front of it; 0 in tables


class Manifest:
    """A file of lines, or a folder of tables."""

    def __init__(self, path: Path, keys: Keys | None = None, text_column: str | None = None) -> None:
        """Looks at the file and its first lines; with ``text_column`` rows of tables are pure text.

        Raises:
            UserError: it is missing or cannot be read, or a key is not known.
        """
        self.path, self._keys = path, keys or Keys()
        self.folder = path if path.is_dir() else path.parent
        """Where the pictures lie that it names."""
        try:
            self.version = f"{path.name} {_version(path)} {text_column or ''} {keys or ''}"
            """Changes when the file does."""
            self._table = Table.open(path, self._keys, text_column)
            self._lines = path
            self._is_packed = self._table is None and (path.suffix == ".gz" or starts_array(path))
            if self._table is None:
                for number, line in enumerate(islice(self._raw_lines(), _LINES_LOOKED_AT)):
                    self._read(number, _parse_line(line) or RejectedSample("blank line"))
        except (OSError, EOFError, zlib.error, NoArrayError) as error:
            raise self._unreadable(getattr(error, "strerror", None) or str(error)) from None

    def unpack(self, folder: Path) -> None:
        """Writes what is packed, or no lines yet, as JSON lines into a folder, where it is not there already."""
        if not self._is_packed:
            return
        self._lines = folder / "manifest.jsonl"
        if self._lines.exists():
            return
        try:
            with new_file(self._lines) as file:
                if starts_array(self.path):
                    file.writelines(entry + b"\n" for entry in self._raw_lines())
                else:
                    with _open(self.path) as packed:
                        shutil.copyfileobj(packed, file, _BYTES_AT_ONCE)
        except (EOFError, zlib.error, gzip.BadGzipFile, NoArrayError) as error:
            raise self._unreadable(str(error)) from None

    def chunks(self, lines_per_chunk: int) -> list[LineRange]:
        """The lines in order, once what is packed was unpacked."""
        if self._table is not None:
            num_lines = self._table.num_rows
            starts = [0] * -(-num_lines // lines_per_chunk)
        else:
            starts = [0, *self._line_starts(lines_per_chunk)]
            num_lines = len(starts) * lines_per_chunk
        return [
            LineRange(number, first, min(lines_per_chunk, num_lines - first), offset)
            for number, (first, offset) in enumerate(zip(range(0, num_lines, lines_per_chunk), starts, strict=True))
        ]

    def read(self, chunk: LineRange) -> Iterator[tuple[int, Line | RejectedSample]]:
        """(line number, its sample or why it has none); blank lines are passed over.

        Raises:
            UserError: a key is not known.
        """
        table = self._table
        rows = self._read_lines(chunk) if table is None else table.read(chunk.first, chunk.num_lines)
        for number, fields in rows:
            yield number, self._read(number, fields)

    def _read(self, number: int, fields: dict[str, Any] | RejectedSample) -> Line | RejectedSample:
        if isinstance(fields, RejectedSample):
            return fields
        try:
            return read_line(self._keys.rename(fields))
        except RejectedSample as rejection:
            return rejection
        except UnknownKeyError as error:
            raise UserError(f"{self.path}, line {number + 1}: {error}") from None

    def _raw_lines(self) -> Iterator[bytes]:
        """The lines of a file that may be packed, or the entries of an array as lines; front to back."""
        with _open(self.path) as file:
            if starts_array(self.path):
                yield from array_entries(file)
            else:
                while line := file.readline(MAX_LINE_BYTES + 1):
                    yield line

    def _line_starts(self, lines_per_chunk: int) -> Iterator[int]:
        """Bytes in front of each chunk but the first."""
        num_lines = offset = 0
        size = self._lines.stat().st_size
        with self._lines.open("rb") as file:
            while block := file.read(_BYTES_AT_ONCE):
                ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
                last = -(num_lines + 1) % lines_per_chunk  # of these ends, the first that also ends a chunk
                for end in ends[last::lines_per_chunk].tolist():
                    if offset + end < size:
                        yield offset + end
                num_lines += len(ends)
                offset += len(block)

    def _read_lines(self, chunk: LineRange) -> Iterator[tuple[int, dict[str, Any] | RejectedSample]]:
        with self._lines.open("rb") as file:
            file.seek(chunk.offset)
            for number in range(chunk.first, chunk.first + chunk.num_lines):
                line = rest = file.readline(MAX_LINE_BYTES + 1)
                while rest and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES)
                if (fields := _parse_line(line)) is not None:
                    yield number, fields

    def _unreadable(self, reason: str) -> UserError:
        return UserError(
            f"manifest {self.path} cannot be read ({reason}): give JSON lines, one object a line, a JSON array of "
            "objects, a .parquet file, or a folder of Hugging Face datasets; the first two may be .gz"
        )


def _version(path: Path) -> str:
    """Of a file, or of the files in a folder."""
    paths = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in paths]
    return " ".join(f"{name if path.is_dir() else ''}{stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _parse_line(line: bytes) -> dict[str, Any] | RejectedSample | None:
    """``None`` of a blank line."""
    if len(line) > MAX_LINE_BYTES:
        return RejectedSample(f"line of more than {MAX_LINE_BYTES} bytes")
    if not line.strip():
        return None
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return RejectedSample("line is not UTF-8")
    except (ValueError, RecursionError):
        return RejectedSample("line is not JSON")
    return fields if isinstance(fields, dict) else RejectedSample("line is not a JSON object")
