"""Sizes as people write them: 0.5B, 500M, 1.8e9."""

import math
import re

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_SIZE = re.compile(r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)([KMBT]?)", re.IGNORECASE)
SMALLEST_MODEL = 1_000.0  # a model of fewer parameters is a number without its unit


def parse_size(value: object, smallest: float = 0.0) -> float:
    """The number that a text or a number stands for.

    Raises:
        ValueError: It is no finite number above 0, or below ``smallest``; the message says what was expected.
    """
    number = math.nan
    if isinstance(value, str):
        if found := _SIZE.fullmatch(value.strip()):
            # Rounded: 0.3 * 1e9 is not a whole number of parameters.
            number = float(f"{float(found[1]) * _UNITS[found[2].upper()]:.12g}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"found {value!r}, expected a number above 0 such as 1.8e9, 1.8B or 500M")
    if number < smallest:
        raise ValueError(f"found {value!r}, expected at least {smallest:g} (a unit may be missing: 8B, 500M)")
    return number


def model_size(value: object) -> float:
    """Parameters of a model."""
    return parse_size(value, SMALLEST_MODEL)


def data_size(value: object) -> float:
    """Samples or tokens seen."""
    return parse_size(value, 1.0)


def format_size(number: float) -> str:
    """The size in its largest unit, to three digits: 1.8B, 600M."""
    rounded = float(f"{number:.3g}")
    unit, scale = next(((unit, scale) for unit, scale in reversed(_UNITS.items()) if rounded >= scale), ("", 1.0))
    return f"{float(f'{number / scale:.3g}'):g}{unit}"
