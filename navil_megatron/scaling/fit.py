"""Robust fits of the laws, their confidence intervals, and how well they describe a study.

The fit is least squares on relative residuals with the soft-L1 loss, from several starts, so that one bad run bends it
little. Intervals come from a residual bootstrap: residuals are drawn again with replacement, widened for the
parameters that were fitted and by Student's t for few points.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import norm
from scipy.stats import t as student

from navil_megatron.config.errors import UserError
from navil_megatron.scaling.laws import LAWS, Array, LogLinear, Parameters
from navil_megatron.scaling.study import CONFIDENCE, Cell, Curve, Study

DRAWS = 300
UNITS = {"llm": 1e9, "encoder": 1e9, "data": 1e6}  # parameters in billions, samples or tokens in millions
LETTERS = {"llm": "N", "encoder": "V", "data": "D"}
OUTLIER = 4.0  # robust standard deviations from the law at which a point is named
_MAD = 1.4826
_NOTHING = 0.002  # A deviation below this share of the loss is none
_MANY = 4  # points beyond the parameters from which on one point can be told to be off


@dataclass(frozen=True, slots=True)
class Points:
    """What is fitted: the means over seeds, and the axes that vary."""

    cells: tuple[Cell, ...]
    axes: tuple[str, ...]
    x: Array  # ``[points, axes]``, divided by ``means``
    means: Array
    losses: Array


@dataclass(frozen=True, slots=True)
class Outlier:
    """A point far from the law."""

    where: str
    loss: float
    expected: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A law's parameters, in the units of ``UNITS``, as reports give them."""

    formula: str
    parameters: Parameters
    intervals: dict[str, tuple[float, float]]
    r2_log: float | None
    """Share of the variance of log loss that the law explains; ``None`` where losses are equal or a law gives none."""
    rmse: float
    leave_one_out_rmse: float | None
    outliers: tuple[Outlier, ...]


def choose_points(study: Study, held: dict[str, float]) -> Points:
    """The points of a study with some axes held at a value; UserError: nothing is there, or nothing varies."""
    cells = [
        cell
        for cell in study.cells()
        if all(math.isclose(getattr(cell.runs[0], axis), value, rel_tol=0.01) for axis, value in held.items())
    ]
    if not cells:
        raise UserError(f"{study.name} has no run at {', '.join(f'{k} {v:g}' for k, v in held.items()) or 'all'}")
    values = {axis: np.array([getattr(cell.runs[0], axis) for cell in cells]) / unit for axis, unit in UNITS.items()}
    axes = tuple(axis for axis, value in values.items() if axis not in held and len(np.unique(value)) > 1)
    if not axes:
        raise UserError(f"{study.name}: all {len(cells)} points have one size and amount of data; nothing to fit")
    x = np.column_stack([values[axis] for axis in axes])
    means = np.exp(np.log(x).mean(axis=0))
    return Points(tuple(cells), axes, x / means, means, np.array([cell.loss for cell in cells]))


def fit_law(name: str, points: Points, seed: int = 0, draws: int = DRAWS) -> Fit:
    """Fits the law of this name; UserError where the points are too few for it."""
    law = LAWS[name]
    _require_enough(law, points)
    best, scale = _fit_robustly(law, points)
    fitted = law.predict(best, points.x)
    logs = np.log(points.losses)
    with np.errstate(invalid="ignore", divide="ignore"):
        r2_log = float(1 - ((logs - np.log(fitted)) ** 2).sum() / ((logs - logs.mean()) ** 2).sum())
    return Fit(
        formula=law.formula,
        parameters=_report(law, points, best),
        intervals=_bootstrap(law, points, best, scale, np.random.default_rng(seed), draws),
        r2_log=r2_log if math.isfinite(r2_log) else None,
        rmse=float(np.sqrt(((points.losses - fitted) ** 2).mean())),
        leave_one_out_rmse=_leave_one_out(law, points, best, scale),
        outliers=_outliers(points, fitted) if len(points.cells) - len(best) >= _MANY else (),
    )


def _require_enough(law: LogLinear, points: Points) -> None:
    name, axes = law.name, " and ".join(points.axes)
    needed, found = law.num_parameters(len(points.axes)) + 1, len(points.cells)
    if found < needed:
        raise UserError(f"{name} over {axes} needs at least {needed} points, found {found}; add runs")
    needed = law.num_parameters(1)
    for axis, values in zip(points.axes, points.x.T, strict=True):
        found = len(np.unique(values))
        if found < needed:
            raise UserError(f"{name} needs at least {needed} values of {axis}, found {found}; add some or hold it")
    if np.linalg.matrix_rank(np.column_stack([np.ones(len(points.x)), np.log(points.x)])) <= len(points.axes):
        raise UserError(f"{name}: {axes} vary only together, found no runs that tell them apart")


def _report(law: LogLinear, points: Points, p: Array) -> Parameters:
    return law.report(p, points.means, [LETTERS[axis] for axis in points.axes])


def _solve(law: LogLinear, x: Array, losses: Array, starts: list[Array], scale: float) -> Array:
    """The parameters of the best start; a residual beyond ``scale`` counts less."""
    bounds, weights = law.bounds(x.shape[1]), law.weights(losses)
    solutions = [
        least_squares(
            lambda p: (law.predict(p, x) - losses) / weights,
            np.clip(start, *bounds),
            jac=lambda p: law.jacobian(p, x) / weights[:, None],
            bounds=bounds,
            loss="soft_l1",
            f_scale=scale,
            x_scale="jac",
            max_nfev=300,
        )
        for start in starts
    ]
    return np.asarray(min(solutions, key=lambda solution: solution.cost).x)


def _fit_robustly(law: LogLinear, points: Points) -> tuple[Array, float]:
    """Parameters, and the residual from which on a point counts less: two robust deviations of a first fit."""
    is_few = len(points.cells) - law.num_parameters(len(points.axes)) < _MANY
    # Of few points none can be told to be off: a scale of the whole loss makes it plain least squares.
    first = _solve(law, points.x, points.losses, law.starts(points.x, points.losses), 1.0 if is_few else 0.02)
    if is_few:
        return first, 1.0
    residuals = law.predict(first, points.x) / points.losses - 1
    scale = max(2 * _MAD * float(np.median(np.abs(residuals))), _NOTHING)
    return _solve(law, points.x, points.losses, [first], scale), scale


def estimate_noise(curves: Iterable[Curve]) -> float | None:
    """Relative standard deviation of a loss, guessed from how far loss curves are from a power law over the encoder.

    For studies without repeated runs. What the law cannot follow counts as noise. ``None`` where no curve has a point
    more than the law has parameters.
    """
    law = LAWS["power-irreducible"]
    total, freedom = 0.0, 0
    for curve in curves:
        if len(curve.encoders) > law.num_parameters(1):
            x, losses = np.array(curve.encoders)[:, None], np.array(curve.losses)
            x = x / np.exp(np.log(x).mean())
            solved = _solve(law, x, losses, law.starts(x, losses), 1.0)
            total += float(((law.predict(solved, x) / losses - 1) ** 2).sum())
            freedom += len(losses) - law.num_parameters(1)
    return math.sqrt(total / freedom) if freedom else None


def _bootstrap(
    law: LogLinear, points: Points, best: Array, scale: float, generator: np.random.Generator, draws: int
) -> dict[str, tuple[float, float]]:
    fitted = law.predict(best, points.x)
    unit = law.weights(fitted)
    residuals = (points.losses - fitted) / unit
    count, freedom = len(residuals), len(residuals) - len(best)
    tails = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
    few = float(student.ppf(tails[1], freedom) / norm.ppf(tails[1]))
    residuals = (residuals - residuals.mean()) * math.sqrt(count / freedom) * few
    drawn = []
    for _ in range(draws):
        losses = np.maximum(fitted + unit * generator.choice(residuals, count), 1e-6)
        drawn.append(_report(law, points, _solve(law, points.x, losses, [best], scale)))
    found = {}
    for name, value in _report(law, points, best).items():
        low, high = np.quantile([each[name] for each in drawn], tails)
        found[name] = (min(float(low), value), max(float(high), value))
    return found


def _leave_one_out(law: LogLinear, points: Points, best: Array, scale: float) -> float | None:
    """RMSE of each point's loss as the law of all others expects it; ``None`` where they are too few."""
    errors = []
    for index, loss in enumerate(points.losses):
        x = np.delete(points.x, index, axis=0)
        if len(x) < len(best) or any(len(np.unique(column)) < law.num_parameters(1) for column in x.T):
            return None
        solved = _solve(law, x, np.delete(points.losses, index), [best], scale)
        errors.append(law.predict(solved, points.x[[index]])[0] - loss)
    return float(np.sqrt(np.mean(np.square(errors))))


def _outliers(points: Points, fitted: Array) -> tuple[Outlier, ...]:
    relative = points.losses / fitted - 1
    distance = np.abs(relative - np.median(relative))
    far = np.flatnonzero(distance > OUTLIER * max(_MAD * float(np.median(distance)), _NOTHING))
    return tuple(Outlier(points.cells[i].where, points.cells[i].loss, float(fitted[i])) for i in far)
