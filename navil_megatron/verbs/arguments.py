"""Arguments that several verbs take, and the types of numbers and sizes, for argparse."""

import math
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from navil_megatron.config.errors import UserError
from navil_megatron.verbs.verb import Argument

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def value(name: str, metavar: str, what: str, kind: Callable[[str], Any] = Path, **settings: Any) -> Argument:
    """An argument with a value, which ``kind`` reads."""
    return Argument(name, {"metavar": metavar, "help": what, "type": kind, **settings})


def choice(name: str, choices: tuple[str, ...], what: str, default: str | None = None) -> Argument:
    """An option with one of a few values."""
    return Argument(name, {"choices": choices, "help": what, "default": default})


def flag(name: str, what: str) -> Argument:
    """An option without a value."""
    return Argument(name, {"action": "store_true", "help": what})


def chosen(options: Namespace, *names: str) -> dict[str, Any]:
    """Options as arguments of a call that names them alike."""
    return {name: getattr(options, name) for name in names}


def _number(parse: Callable[[str], float], fits: Callable[[float], bool], expected: str) -> Callable[[str], Any]:
    """A type of number for argparse, which says what was expected."""

    def read(text: str) -> float:
        try:
            number = parse(text)
        except ValueError:
            number = math.nan
        if not fits(number):
            raise ArgumentTypeError(f"found {text!r}, expected {expected}")
        return number

    return read


count = _number(int, lambda number: number >= 1, "a whole number, at least 1")
count_from_0 = _number(int, lambda number: number >= 0, "a whole number, at least 0")
not_negative = _number(float, lambda number: 0 <= number < math.inf, "a number, at least 0")
positive = _number(float, lambda number: 0 < number < math.inf, "a number, more than 0")
share = _number(float, lambda number: 0 < number <= 1, "a number, more than 0 and at most 1")


def file_size(text: str) -> int:
    """Bytes of a size as transformers writes it, e.g. ``5GB`` or ``300MB``."""
    match = re.fullmatch(r"(\d{1,12}) ?([KMGT]i?B)", text, re.IGNORECASE)
    unit = match and _UNITS.get(match[2].upper())
    if match is None or not unit or int(match[1]) * unit < 1:
        raise ArgumentTypeError(f"found {text!r}, expected a size as 5GB, 300MB or 2GiB")
    return int(match[1]) * unit


def require_picture_name(path: Path) -> None:
    """Refuses, with a UserError, a picture whose name ends in neither ``.svg`` nor ``.png``."""
    if path.suffix not in (".svg", ".png"):
        raise UserError(f"--output {path}: found {path.suffix or 'no suffix'}, expected .svg or .png")


CONFIG = value("config", "CONFIG", "TOML file of the run")
OVERRIDES = value(
    "overrides",
    "section.field=value",
    "settings to change, in TOML; FILE.toml: a config to lay over",
    str,
    nargs="*",
)
JOBS = value("--jobs", "N", "processes that share the work (1)", count, default=1)
EXPORTED = value("folder", "FOLDER", "what convert to-hf wrote; must be trusted")
DTYPE = choice("--dtype", ("float32", "bfloat16"), "type of the weights (as stored)")
DEVICE = choice("--device", ("cpu", "cuda"), "where the model runs (cpu)", default="cpu")
