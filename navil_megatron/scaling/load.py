"""One loader for a study's results: JSON lines, one run a line, or the curves read off the paper's figures.

``docs/scaling.md`` describes the lines. Every problem of a file is found at once and named with file and line.
"""

import json
from collections.abc import Callable, Mapping
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
    name = str(path) if path else "the paper's curves (read off its figures)"
    curves = _as_curves(text)
    if curves is not None:
        return read_curves(curves, str(path or file.name), name)
    return _read_lines(text, str(file), name)


def _as_curves(text: str) -> Mapping[str, Any] | None:
    """The object of a curves file; ``None`` where the text is something else."""
    try:
        whole = json.loads(text)
    except ValueError:
        return None
    is_curves = isinstance(whole, dict) and any(isinstance(value, dict | list) for value in whole.values())
    return whole if is_curves and not set(whole) & set(_READERS) else None


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"found {value!r}, expected a whole number from 1 up")
    return value


def _seed(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"found {value!r}, expected a whole number from 0 up")
    return value


def _loss(value: object) -> float:
    if isinstance(value, str):
        raise ValueError(f"found {value!r}, expected a number above 0")
    return parse_size(value)


def _tags(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        raise ValueError(f"found {value!r}, expected a list of texts")
    return tuple(value)


_READERS: dict[str, Callable[[object], Any]] = {
    "llm_parameters": model_size,
    "encoder_parameters": model_size,
    "samples": data_size,
    "tokens": data_size,
    "validation_loss": _loss,
    "seed": _seed,
    "depth": _whole,
    "width": _whole,
    "heads": _whole,
    "tags": _tags,
    "gpu_hours": parse_size,
}
_REQUIRED = ("llm_parameters", "encoder_parameters", "validation_loss")


def _read_lines(text: str, file: str, name: str) -> Study:
    problems: list[str] = []
    runs: list[Run] = []
    units: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            where = f"{file}:{number}"
            found, wrong = _read_line(line, where)
            problems += wrong
            if found is not None:
                run, unit = found
                runs.append(run)
                units.setdefault(unit, where)
    if len(units) == 2:
        problems.append(f"{units['samples']} counts samples and {units['tokens']} tokens; use one of them in a file")
    if not runs and not problems:
        problems.append(f"{file} holds no runs; expected one JSON object a line")
    if problems:
        raise ConfigError(problems)
    runs, warnings = _without_repeats(runs)
    return Study(name=name, runs=tuple(runs), data_unit=next(iter(units)), warnings=tuple(warnings))


def _read_line(line: str, where: str) -> tuple[tuple[Run, str] | None, list[str]]:
    """The run of a line and the unit of its data, or its problems."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        return None, [f"{where}: no JSON ({error}); expected one run a line"]
    if not isinstance(fields, dict):
        return None, [f"{where}: found {type(fields).__name__}, expected an object with {', '.join(_REQUIRED)}"]
    problems, values = [], {}
    for key, value in fields.items():
        if key not in _READERS:
            near = get_close_matches(key, _READERS, n=1)
            problems.append(f"{where}: unknown field {key}; {f'did you mean {near[0]}?' if near else _known()}")
        elif value is not None or key in _REQUIRED:
            try:
                values[key] = _READERS[key](value)
            except ValueError as error:
                problems.append(f"{where}: {key}: {error}")
    problems += [f"{where}: {key} is missing" for key in _REQUIRED if key not in fields]
    given = [unit for unit in ("samples", "tokens") if fields.get(unit) is not None]
    if len(given) != 1:
        problems.append(f"{where}: expected one of samples and tokens, found {' and '.join(given) or 'neither'}")
    if {"width", "heads"} <= set(values) and values["width"] % values["heads"]:
        problems.append(f"{where}: heads = {values['heads']} does not divide width = {values['width']}")
    if problems:
        return None, problems
    run = Run(
        llm=values["llm_parameters"],
        encoder=values["encoder_parameters"],
        data=values[given[0]],
        loss=values["validation_loss"],
        where=where,
        **{key: values[key] for key in ("seed", "depth", "width", "heads", "tags") if key in values},
    )
    return (run, given[0]), []


def _known() -> str:
    return f"known are {', '.join(_READERS)}"


def _without_repeats(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """The runs without those that were written down twice: equal in all, a given seed and the loss included."""
    kept: dict[tuple[object, ...], Run] = {}
    warnings = []
    for run in runs:
        key = (run.llm, run.encoder, run.data, run.shape, run.seed, run.loss, run.where if run.seed is None else "")
        if key in kept:
            warnings.append(f"{run.where} repeats {kept[key].where} with the same seed and loss; counted once")
        kept.setdefault(key, run)
    return list(kept.values()), warnings
