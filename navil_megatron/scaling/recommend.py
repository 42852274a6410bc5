"""The encoder for an LLM: by the 1% rule where the study measured that LLM, by the log-log line elsewhere."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from navil_megatron.config.errors import UserError
from navil_megatron.scaling.fit import estimate_noise
from navil_megatron.scaling.line import Line
from navil_megatron.scaling.rule import THRESHOLD, Interval, Optimum, find_optimum, redraw
from navil_megatron.scaling.shape import Shape, choose_shape
from navil_megatron.scaling.sizes import format_size
from navil_megatron.scaling.study import CONFIDENCE, Curve, Study, curves_at

SAME_LLM = 0.01  # relative difference within which an asked LLM is a measured one
_NOISES = {
    "seeds": "the spread of seeds",
    "curves": "noise as guessed from the curves",
    "reading": "the error of reading the figure",
}


@dataclass(frozen=True)
class Optima:
    """Every LLM's optimum, and the line through those inside their curves."""

    study: Study
    threshold: float
    found: tuple[Optimum, ...]
    noise: str  # where the noise of a loss is known from: ``seeds``, ``curves``, ``reading`` or ``unknown``
    warnings: tuple[str, ...]

    @property
    def data(self) -> tuple[float, ...]:
        """The amounts of data at which the optima were found."""
        return tuple(sorted({optimum.curve.data for optimum in self.found}))

    @cached_property
    def line(self) -> Line | None:
        """The log-log line; ``None`` of fewer than two optima inside their curves."""
        inside = [optimum for optimum in self.found if optimum.is_inside]
        if len(inside) < 2:
            return None
        drawn = [[each.curve.encoders[index] for index in each.drawn] for each in inside if each.is_widened]
        return Line(
            tuple(optimum.llm for optimum in inside),
            tuple(optimum.encoder for optimum in inside),
            tuple(_halves(optimum) for optimum in inside),
            tuple(zip(*drawn, strict=True)),
        )


def _halves(optimum: Optimum) -> tuple[float, float]:
    low, high = optimum.cell
    assert low is not None and high is not None, "only optima inside their curves are on the line"
    return math.log(optimum.encoder / low), math.log(high / optimum.encoder)


def find_optima(
    study: Study, threshold: float = THRESHOLD, data: float | None = None, seed: int = 0, llm: float | None = None
) -> Optima:
    """Applies the 1% rule to every LLM of a study.

    Compares at ``data`` samples or tokens. If left out: the most that ``llm``, the LLM that is asked for, was given
    where it was measured, else the most that every LLM was given.

    Raises:
        UserError: No LLM has a curve.
    """
    if data is None and llm is not None:
        data = max((curve.data for curve in study.curves() if _is_same(curve.llm, llm)), default=None)
    curves, warnings = curves_at(study, data)
    if not curves:
        amounts = ", ".join(format_size(amount) for amount in sorted({curve.data for curve in study.curves()}))
        raise UserError(
            f"{study.name} has no LLM with an encoder and one of twice its size at "
            f"{'any amount of data' if data is None else f'{format_size(data)} {study.data_unit}'}; "
            f"{f'curves are there at {amounts}' if amounts else 'train both'}"
        )
    found = [find_optimum(curve, threshold) for curve in curves]
    noise, scale, told = _find_noise(study, curves)
    if scale is not None:
        found = [
            replace(optimum, drawn=redraw(optimum, scale, threshold, seed), is_widened=noise != "reading")
            for optimum in found
        ]
    warnings += told
    cells = [(cell.runs[0].llm, cell.runs[0].data) for cell in study.cells()]
    for optimum in found:
        name = f"LLM {format_size(optimum.llm)}"
        warnings += [f"{name}: {note}" for note in optimum.notes]
        if cells.count((optimum.llm, optimum.curve.data)) > len(optimum.curve.cells):
            warnings.append(f"{name}: of several shapes of one encoder size the best counts")
    return Optima(study, threshold, tuple(found), noise, (*study.warnings, *warnings))


def _is_same(llm: float, asked: float) -> bool:
    return abs(llm / asked - 1) < SAME_LLM


def _find_noise(study: Study, curves: list[Curve]) -> tuple[str, float | None, list[str]]:
    """Where the noise of a loss is known from, its relative size, and what to warn of."""
    of_seeds = study.noise()
    if of_seeds is not None:
        is_single = any(len(cell.runs) == 1 for curve in curves for cell in curve.cells)
        told = ["some points are a single run; they are given the spread of the others' seeds"] if is_single else []
        return "seeds", of_seeds, told
    if study.reading_error is not None:
        return "reading", study.reading_error, []
    guessed = estimate_noise(curves)
    if guessed is not None:
        guess = f"every point is a single run: noise of {guessed:.2%} is guessed from how rough the curves are"
        return "curves", guessed, [guess]
    return "unknown", None, ["every point is a single run and no curve has 4 sizes: intervals leave the noise out"]


@dataclass(frozen=True, slots=True)
class Recommendation:
    """An encoder for an LLM."""

    llm: float
    encoder: float
    relation: str
    method: str  # ``rule`` for a measured LLM, ``line`` for another
    interval: Interval
    shape: Shape
    is_extrapolated: bool
    warnings: tuple[str, ...]


def recommend(optima: Optima, llm: float) -> Recommendation:
    """The encoder for an LLM.

    Raises:
        UserError: The LLM was not measured, and fewer than two optima are known to lay a line through.
    """
    line, is_extrapolated = optima.line, False
    found = next((found for found in optima.found if _is_same(found.llm, llm)), None)
    if found is not None:
        method, encoder, relation = "rule", found.encoder, found.relation
        interval, warnings = found.interval, _warn_of_rule(optima, found)
    elif line is not None:
        method, encoder, relation = "line", line.predict(llm), "equal"
        interval, warnings = line.interval(llm), _warn_of_line(optima, line, llm)
        is_extrapolated = not min(line.llms) <= llm <= max(line.llms)
    else:
        inside = sum(each.is_inside for each in optima.found)
        raise UserError(
            f"the study did not train an LLM of {format_size(llm)}, and a line to it needs 2 LLMs whose optimum "
            f"lies inside their curve, found {inside}; train more encoder sizes, or ask for one of "
            f"{', '.join(format_size(each.llm) for each in optima.found)}"
        )
    shape, of_shape = choose_shape(encoder)
    every = (*optima.warnings, *warnings, *of_shape)
    return Recommendation(llm, encoder, relation, method, interval, shape, is_extrapolated, every)


def _warn_of_rule(optima: Optima, found: Optimum) -> list[str]:
    size, share, warnings = format_size(found.encoder), f"{optima.threshold:.0%}", []
    if found.relation == "at least":
        warnings.append(
            f"every doubling up to {size} gains {share} or more: the optimum is at least this; train larger encoders"
        )
    elif found.relation == "at most":
        warnings.append(
            f"already the first doubling from {size} gains less than {share}: the optimum is at most this; train "
            "smaller encoders"
        )
    if found.agreement is not None and found.agreement < CONFIDENCE:
        warnings.append(
            f"under {_NOISES[optima.noise]} the rule gives the same encoder in {found.agreement:.0%} of draws"
            + ("" if found.is_widened else "; the interval is that of the grid alone")
        )
    return warnings


def _warn_of_line(optima: Optima, line: Line, llm: float) -> list[str]:
    low, high = line.exponent_interval()
    warnings = [
        f"the exponent {line.exponent:.3f} comes from {len(line.llms)} points, each known to a step of its grid: "
        f"anything from {low:.2f} to {high:.2f} fits them"
    ]
    smallest, largest = min(line.llms), max(line.llms)
    if not smallest <= llm <= largest:
        warnings.append(
            f"extrapolated: {format_size(llm)} is {max(smallest / llm, llm / largest):.3g} times beyond the measured "
            f"{format_size(smallest)} to {format_size(largest)}"
        )
    outside = [found for found in optima.found if not found.is_inside]
    if outside:
        sizes = ", ".join(f"{format_size(f.llm)} ({f.relation} {format_size(f.encoder)})" for f in outside)
        warnings.append(f"left out of the line, since their optimum is at an end of the curve: {sizes}")
    if len(line.llms) == 2:
        warnings.append("two points fit any line: nothing shows that the sizes follow one")
    return warnings
