"""The lines of a manifest: JSON lines or rows of parquet, cut into chunks that are read independently."""

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from navil_megatron.config.errors import UserError
from navil_megatron.data.content import RejectedSample

MAX_LINE_BYTES = 2**22
_BYTES_AT_ONCE = 2**24


@dataclass(frozen=True, slots=True)
class Chunk:
    """Lines that one shard is made of."""

    number: int
    first: int
    num_lines: int
    offset: int  # bytes of the manifest in front of it; 0 in parquet


class Manifest:
    """A file of lines."""

    def __init__(self, path: Path, text_column: str) -> None:
        """Looks at the file; UserError where it is missing, or parquet that cannot be read."""
        self.path, self._text_column = path, text_column
        self._is_parquet = path.suffix == ".parquet"
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from None
        self.version = f"{path.name} {status.st_size} {status.st_mtime_ns} {text_column if self._is_parquet else ''}"
        """Changes when the file does."""
        self._size = status.st_size
        if self._is_parquet:
            self._open_parquet().close()

    def chunks(self, lines_per_chunk: int) -> list[Chunk]:
        """The lines in order."""
        if self._is_parquet:
            with self._open_parquet() as table:
                num_lines = table.metadata.num_rows
            starts = [0] * -(-num_lines // lines_per_chunk)
        else:
            starts = [0, *self._line_starts(lines_per_chunk)]
            num_lines = len(starts) * lines_per_chunk
        return [
            Chunk(number, first, min(lines_per_chunk, num_lines - first), offset)
            for number, (first, offset) in enumerate(zip(range(0, num_lines, lines_per_chunk), starts, strict=True))
        ]

    def read(self, chunk: Chunk) -> Iterator[tuple[int, dict[str, Any] | RejectedSample]]:
        """(line number, its fields or why it has none); blank lines are passed over."""
        return self._read_parquet(chunk) if self._is_parquet else self._read_lines(chunk)

    def _line_starts(self, lines_per_chunk: int) -> Iterator[int]:
        """Bytes in front of each chunk but the first."""
        num_lines = offset = 0
        with self.path.open("rb") as file:
            while block := file.read(_BYTES_AT_ONCE):
                ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
                last = -(num_lines + 1) % lines_per_chunk  # of these ends, the first that also ends a chunk
                for end in ends[last::lines_per_chunk].tolist():
                    if offset + end < self._size:
                        yield offset + end
                num_lines += len(ends)
                offset += len(block)

    def _read_lines(self, chunk: Chunk) -> Iterator[tuple[int, dict[str, Any] | RejectedSample]]:
        with self.path.open("rb") as file:
            file.seek(chunk.offset)
            for number in range(chunk.first, chunk.first + chunk.num_lines):
                line = file.readline(MAX_LINE_BYTES + 1)
                is_long = len(line) > MAX_LINE_BYTES
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES)
                if is_long:
                    yield number, RejectedSample(f"line of more than {MAX_LINE_BYTES} bytes")
                elif line.strip():
                    yield number, _parse_line(line)

    def _read_parquet(self, chunk: Chunk) -> Iterator[tuple[int, dict[str, Any] | RejectedSample]]:
        with self._open_parquet() as table:
            first = 0
            for group in range(table.num_row_groups):
                end = first + table.metadata.row_group(group).num_rows
                low, high = max(first, chunk.first), min(end, chunk.first + chunk.num_lines)
                if low < high:
                    column = table.read_row_group(group, columns=[self._text_column]).column(0)
                    for number, text in enumerate(column.slice(low - first, high - low), low):
                        yield number, {"text": text.as_py()}
                first = end

    def _open_parquet(self) -> Any:
        if importlib.util.find_spec("pyarrow") is None:
            raise UserError(f"{self.path} is parquet, which needs pyarrow: pip install 'navil_megatron[parquet]'")
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(self.path)
        except (OSError, pyarrow.ArrowException) as error:
            raise self._unreadable(str(error).split("\n", 1)[0]) from None
        columns = [field.name for field in table.schema_arrow if str(field.type) in ("string", "large_string")]
        if self._text_column not in columns:
            raise UserError(
                f"{self.path} has no text column {self._text_column!r} (found {', '.join(columns) or 'none'}): "
                "choose one with --text-column"
            )
        return table

    def _unreadable(self, reason: str) -> UserError:
        return UserError(
            f"manifest {self.path} cannot be read ({reason}): give JSON lines, one object a line, or a .parquet file"
        )


def _parse_line(line: bytes) -> dict[str, Any] | RejectedSample:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return RejectedSample("line is not UTF-8")
    except (ValueError, RecursionError):
        return RejectedSample("line is not JSON")
    return fields if isinstance(fields, dict) else RejectedSample("line is not a JSON object")
