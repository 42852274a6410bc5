"""One loader for a study's results: JSON lines, one run a line, or the curves read off the paper's figures.

``docs/scaling.md`` describes the lines. Every problem of a file is found at once and named with file and line.
"""

import json
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from navil_megatron.config.errors import ConfigError, UserError
from navil_megatron.scaling.paper import PAPER_FILE, read_curves
from navil_megatron.scaling.sizes import data_size, model_size, parse_size
from navil_megatron.scaling.study import Run, Study


def load_study(path: Path | None) -> Study:
    """The study of a file; the paper's curves without one.

    Raises:
        UserError: The file cannot be read or holds no study.
        ConfigError: Lines or curves are wrong; one problem each.
    """
    file = path or PAPER_FILE
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; expected a study's JSON lines or curves") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text; expected a study's JSON lines or curves") from None
    curves = _as_curves(text)
    if curves is None:
        return _read_lines(text, str(file))
    return read_curves(curves, str(path or file.name), str(path or "the paper's curves (read off its figures)"))


def _as_curves(text: str) -> dict[str, Any] | None:
    """The object of a curves file; ``None`` where the text is something else."""
    try:
        whole = json.loads(text)
    except ValueError:
        return None
    is_curves = isinstance(whole, dict) and any(isinstance(value, dict | list) for value in whole.values())
    return whole if is_curves and not set(whole) & set(_FIELDS) else None


def _whole_from(least: int) -> Callable[[object], int]:
    def whole(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"found {value!r}, expected a whole number from {least} up")
        return value

    return whole


def _loss(value: object) -> float:
    if isinstance(value, str):
        raise ValueError(f"found {value!r}, expected a number above 0")
    return parse_size(value)


def _tags(value: object) -> object:
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        raise ValueError(f"found {value!r}, expected a list of texts")
    return value


_FIELDS: dict[str, Callable[[object], Any]] = {
    "llm_parameters": model_size,
    "encoder_parameters": model_size,
    "samples": data_size,
    "tokens": data_size,
    "validation_loss": _loss,
    "seed": _whole_from(0),
    "depth": _whole_from(1),
    "width": _whole_from(1),
    "heads": _whole_from(1),
    "tags": _tags,
    "gpu_hours": parse_size,
}
_REQUIRED = ("llm_parameters", "encoder_parameters", "validation_loss")


def _read_lines(text: str, file: str) -> Study:
    problems: list[str] = []
    runs: dict[tuple[object, ...], Run] = {}
    warnings: list[str] = []
    units: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            run, unit = _read_line(line, where)
        except ConfigError as error:
            problems += (f"{where}: {problem}" for problem in error.problems)
            continue
        units.setdefault(unit, where)
        # Equal in all, a given seed and the loss included, is a line that was written down twice.
        key = (run.llm, run.encoder, run.data, run.shape, run.seed, run.loss, where if run.seed is None else "")
        if runs.setdefault(key, run) is not run:
            warnings.append(f"{where} repeats {runs[key].where} with the same seed and loss; counted once")
    if len(units) == 2:
        problems.append(f"{units['samples']} counts samples and {units['tokens']} tokens; use one of them in a file")
    if not runs and not problems:
        problems.append(f"{file} holds no runs; expected one JSON object a line")
    if problems:
        raise ConfigError(problems)
    return Study(name=file, runs=tuple(runs.values()), data_unit=next(iter(units)), warnings=tuple(warnings))


def _read_line(line: str, where: str) -> tuple[Run, str]:
    """The run of a line and the unit of its data; ConfigError with every problem of the line."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"no JSON ({error}); expected one run a line") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"found {type(fields).__name__}, expected an object with {', '.join(_REQUIRED)}")
    problems, values = [], {}
    for key, value in fields.items():
        if key not in _FIELDS:
            near = get_close_matches(key, _FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(_FIELDS)}"
            problems.append(f"unknown field {key}; {hint}")
        elif value is not None or key in _REQUIRED:
            try:
                values[key] = _FIELDS[key](value)
            except ValueError as error:
                problems.append(f"{key}: {error}")
    problems += [f"{key} is missing" for key in _REQUIRED if key not in fields]
    given = [unit for unit in ("samples", "tokens") if fields.get(unit) is not None]
    if len(given) != 1:
        problems.append(f"expected one of samples and tokens, found {' and '.join(given) or 'neither'}")
    depth, width, heads = (values.get(key) for key in ("depth", "width", "heads"))
    if width and heads and width % heads:
        problems.append(f"heads = {heads} does not divide width = {width}")
    if problems:
        raise ConfigError(problems)
    run = Run(
        llm=values["llm_parameters"],
        encoder=values["encoder_parameters"],
        data=values[given[0]],
        loss=values["validation_loss"],
        where=where,
        seed=values.get("seed"),
        shape=(depth, width, heads),
    )
    return run, given[0]
