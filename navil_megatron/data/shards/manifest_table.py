"""Rows of tables: parquet, and what Hugging Face ``datasets`` saves (arrow streams); pictures lie in them or beside."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from navil_megatron.config.errors import UserError
from navil_megatron.data.content import RejectedSample
from navil_megatron.data.shards.manifest_line import Keys, UnknownKeyError

_ROWS_AT_ONCE = 64  # a row may hold pictures
_OF_IMG2DATASET = {"key", "status", "url"}


class Table:
    """The rows of one or several files of the same columns, one behind the other."""

    def __init__(self, paths: list[Path], keys: Keys, text_column: str | None) -> None:
        """Reads the columns and counts the rows; UserError where a file cannot be read or a column is not known."""
        self._paths = paths
        columns = _columns(paths[0])
        self._text_column = text_column
        self._wanted = [text_column] if text_column is not None else _wanted(paths[0], columns, keys)
        if text_column is not None and text_column not in columns:
            raise UserError(
                f"{paths[0]} has no text column {text_column!r} (found {', '.join(columns) or 'none'}): "
                "choose one with --text-column"
            )
        self._num_rows = [_num_rows(path) for path in paths]
        self.num_rows = sum(self._num_rows)

    @classmethod
    def open(cls, path: Path, keys: Keys, text_column: str | None) -> "Table | None":
        """The table in a file or folder; ``None`` where the file is none."""
        paths = [path] if path.suffix in (".parquet", ".arrow") else []
        if path.is_dir():
            if (path / "dataset_dict.json").exists():
                names = ", ".join(sorted(str(split) for split in path.iterdir() if split.is_dir()))
                raise UserError(f"{path} holds several splits: give one of {names}")
            paths = sorted(path.glob("*.arrow")) or sorted(path.glob("*.parquet"))
            if not paths:
                raise UserError(
                    f"{path} is a folder without .arrow or .parquet files: give a manifest, or such a folder"
                )
        if paths and importlib.util.find_spec("pyarrow") is None:
            raise UserError(f"{path} is a table, which needs pyarrow: pip install 'navil_megatron[parquet]'")
        return cls(paths, keys, text_column) if paths else None

    def read(self, first: int, num_rows: int) -> Iterator[tuple[int, dict[str, Any] | RejectedSample]]:
        """(number, its columns) of some rows."""
        start = 0
        for path, rows_of_file in zip(self._paths, self._num_rows, strict=True):
            low, high = max(first - start, 0), min(first + num_rows - start, rows_of_file)
            if low < high:
                for number, row in _rows(path, low, high, self._wanted):
                    yield start + number, row if self._text_column is None else {"text": row[self._text_column]}
            start += rows_of_file


def _wanted(path: Path, columns: list[str], keys: Keys) -> list[str]:
    """The columns of a sample; UserError where one is neither known nor named."""
    if set(columns) >= _OF_IMG2DATASET and (tar := path.with_suffix(".tar")).exists():
        raise UserError(
            f"{path} is img2dataset's table of {tar}, which holds the pairs: give that one to navil-megatron data index"
        )
    wanted = []
    for column in columns:
        try:
            wanted += [column] if keys.rename({column: True}) else []
        except UnknownKeyError as error:
            raise UserError(f"{path}: column {error}, or --text-column NAME if all is pure text") from None
    missing = [theirs for _, theirs in keys.names if theirs not in columns]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}, which --map names (found {', '.join(columns)})")
    return wanted


def _columns(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        with _parquet(path) as file:
            return [str(name) for name in file.schema_arrow.names]
    with _stream(path) as stream:
        return [str(name) for name in stream.schema.names]


def _num_rows(path: Path) -> int:
    if path.suffix == ".parquet":
        with _parquet(path) as file:
            return int(file.metadata.num_rows)
    with _stream(path) as stream:
        return sum(batch.num_rows for batch in stream)


def _rows(path: Path, low: int, high: int, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows ``low`` to ``high`` of a file."""
    for start, batch in _batches(path, low, high, columns):
        first, end = max(low, start), min(high, start + batch.num_rows)
        for number in range(first, end, _ROWS_AT_ONCE):
            some = batch.slice(number - start, min(_ROWS_AT_ONCE, end - number))
            yield from enumerate(some.to_pylist(), number)


def _batches(path: Path, low: int, high: int, columns: list[str]) -> Iterator[tuple[int, Any]]:
    """(its first row, a batch), at least those that hold rows ``low`` to ``high``."""
    start = 0
    if path.suffix != ".parquet":
        with _stream(path) as stream:
            for batch in stream:
                yield start, batch.select(columns)
                start += batch.num_rows
        return
    with _parquet(path) as file:
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            if low < end and start < high:
                for batch in file.iter_batches(row_groups=[group], columns=columns):
                    yield start, batch
                    start += batch.num_rows
            start = end


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with _readable(path), pyarrow.parquet.ParquetFile(path) as file:
        yield file


@contextmanager
def _stream(path: Path) -> Iterator[Any]:
    """An arrow file as ``Dataset.save_to_disk`` writes it."""
    import pyarrow

    with _readable(path), pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        yield stream


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(f"manifest {path} cannot be read ({reason}): restore it, or write it anew") from None
