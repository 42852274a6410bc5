"""The forms of loss as a function of LLM size N, encoder size V and data D.

- ``log-linear``: L = a + b ln N + c ln V + d ln D
- ``power``: L = A N^-a V^-b D^-c
- ``power-irreducible``: L = E + A N^-a + B V^-b + C D^-c, what no size and no data takes away being E

Inside, every axis is divided by its geometric mean, so that the parameters of a fit are of one size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Parameters = dict[str, float]
LARGEST_EXPONENT = 5.0


@dataclass(frozen=True, slots=True)
class Law:
    """One form; ``x`` are the scaled axes, ``[points, axes]``."""

    name: str
    num_parameters: Callable[[int], int]
    """Of so many axes."""
    min_values: int
    """Different values that each axis must take."""
    predict: Callable[[Array, Array], Array]
    """Losses from parameters and ``x``."""
    jacobian: Callable[[Array, Array], Array]
    starts: Callable[[Array, Array], list[Array]]
    """Where to start, from ``x`` and losses."""
    bounds: Callable[[int], tuple[Array, Array]]
    report: Callable[[Array, Array, tuple[str, ...]], Parameters]
    """Named parameters in the units of the axes, from those inside, the axes' means and the axes' letters."""


def _design(x: Array) -> Array:
    return np.column_stack([np.ones(len(x)), np.log(x)])


def _unbounded(axes: int) -> tuple[Array, Array]:
    return np.full(1 + axes, -np.inf), np.full(1 + axes, np.inf)


def _report_log_linear(p: Array, means: Array, letters: tuple[str, ...]) -> Parameters:
    slopes = {f"slope_{letter}": float(slope) for letter, slope in zip(letters, p[1:], strict=True)}
    return {"constant": float(p[0] - p[1:] @ np.log(means)), **slopes}


def _report_power(p: Array, means: Array, letters: tuple[str, ...]) -> Parameters:
    exponents = {f"exponent_{letter}": float(-slope) for letter, slope in zip(letters, p[1:], strict=True)}
    return {"factor": float(np.exp(p[0] - p[1:] @ np.log(means))), **exponents}


def _predict_power(p: Array, x: Array) -> Array:
    return np.asarray(np.exp(_design(x) @ p))


def _split(p: Array) -> tuple[float, Array, Array]:
    axes = (len(p) - 1) // 2
    return float(p[0]), p[1 : 1 + axes], p[1 + axes :]


def _predict_irreducible(p: Array, x: Array) -> Array:
    rest, factors, exponents = _split(p)
    return np.asarray(rest + x**-exponents @ factors)


def _jacobian_irreducible(p: Array, x: Array) -> Array:
    _, factors, exponents = _split(p)
    powers = x**-exponents
    return np.column_stack([np.ones(len(x)), powers, -factors * powers * np.log(x)])


def _starts_irreducible(x: Array, losses: Array) -> list[Array]:
    axes, low = x.shape[1], float(losses.min())
    found = []
    for share in (0.1, 0.5, 0.9):
        for exponent in (0.1, 0.4, 1.0):
            factor = max(float(np.median(losses)) - share * low, 1e-3) / axes
            found.append(np.array([share * low] + [factor] * axes + [exponent] * axes))
    return found


def _bounds_irreducible(axes: int) -> tuple[Array, Array]:
    upper = [np.inf] * (1 + axes) + [LARGEST_EXPONENT] * axes
    return np.zeros(1 + 2 * axes), np.array(upper)


def _report_irreducible(p: Array, means: Array, letters: tuple[str, ...]) -> Parameters:
    rest, factors, exponents = _split(p)
    named = {"irreducible": rest}
    for letter, factor, exponent, mean in zip(letters, factors, exponents, means, strict=True):
        named[f"factor_{letter}"] = float(factor * mean**exponent)
        named[f"exponent_{letter}"] = float(exponent)
    return named


def _least_squares(x: Array, values: Array) -> list[Array]:
    return [np.linalg.lstsq(_design(x), values, rcond=None)[0]]


LAWS = {
    law.name: law
    for law in (
        Law(
            "log-linear",
            lambda axes: 1 + axes,
            2,
            lambda p, x: np.asarray(_design(x) @ p),
            lambda p, x: _design(x),
            _least_squares,
            _unbounded,
            _report_log_linear,
        ),
        Law(
            "power",
            lambda axes: 1 + axes,
            2,
            _predict_power,
            lambda p, x: _predict_power(p, x)[:, None] * _design(x),
            lambda x, losses: _least_squares(x, np.log(losses)),
            _unbounded,
            _report_power,
        ),
        Law(
            "power-irreducible",
            lambda axes: 1 + 2 * axes,
            3,
            _predict_irreducible,
            _jacobian_irreducible,
            _starts_irreducible,
            _bounds_irreducible,
            _report_irreducible,
        ),
    )
}
