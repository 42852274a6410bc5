"""The encoder for an LLM: by the 1% rule where the study measured that LLM, by the log-log line elsewhere."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from navil_megatron.config.errors import UserError
from navil_megatron.scaling.fit import estimate_noise
from navil_megatron.scaling.line import CONFIDENCE, Line
from navil_megatron.scaling.rule import DRAWS, THRESHOLD, Optimum, find_optimum, redraw
from navil_megatron.scaling.shape import Shape, choose_shape
from navil_megatron.scaling.sizes import format_size
from navil_megatron.scaling.study import Cell, Curve, Study, curves_at

SAME_LLM = 0.01
"""Relative difference within which an asked LLM is a measured one."""
_NOISES = {
    "seeds": "the spread of seeds",
    "curves": "noise as guessed from the curves",
    "reading": "the error of reading the figure",
}
Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class Optima:
    """Every LLM's optimum, and the line through those inside their curves."""

    study: Study
    threshold: float
    found: tuple[Optimum, ...]
    draws: tuple[tuple[Optimum, ...], ...]
    """Of noisy copies, one row for each LLM; empty where no noise is known."""
    noise: str
    """Where the noise of the copies comes from: ``seeds``, ``curves``, ``reading`` or ``unknown``."""
    warnings: tuple[str, ...]

    @property
    def data(self) -> tuple[float, ...]:
        """The amounts of data at which the optima were found."""
        return tuple(sorted({optimum.curve.data for optimum in self.found}))

    @cached_property
    def line(self) -> Line | None:
        """The log-log line; ``None`` of fewer than two optima inside their curves."""
        inside = [i for i, optimum in enumerate(self.found) if optimum.is_inside]
        if len(inside) < 2:
            return None
        drawn = [[optimum.encoder for optimum in self.draws[i]] for i in inside] if self.are_draws_of_noise else []
        return Line(
            tuple(self.found[i].llm for i in inside),
            tuple(self.found[i].encoder for i in inside),
            tuple(_halves(self.found[i]) for i in inside),
            tuple(zip(*drawn, strict=True)),
        )

    @property
    def are_draws_of_noise(self) -> bool:
        """Whether the draws follow noise of the runs: the paper's optima are published, only their losses were read."""
        return self.noise in ("seeds", "curves")

    def agreement(self, index: int) -> float | None:
        """Share of noisy copies of a curve with the same optimum."""
        if not self.draws:
            return None
        found = self.found[index]
        counts = Counter((drawn.encoder, drawn.relation) for drawn in self.draws[index])
        return counts[(found.encoder, found.relation)] / DRAWS

    def interval_of(self, index: int) -> Interval:
        """Where the optimum of a measured LLM can be: its cell of the grid, and those that noise moves it to."""
        cells = [self.found[index].cell]
        if self.are_draws_of_noise:
            ordered = sorted(self.draws[index], key=lambda optimum: (optimum.encoder, optimum.relation != "at most"))
            tail = round((1 - CONFIDENCE) / 2 * DRAWS)
            cells += [ordered[tail].cell, ordered[-1 - tail].cell]
        lows, highs = zip(*cells, strict=True)
        return (
            None if None in lows else min(low for low in lows if low is not None),
            None if None in highs else max(high for high in highs if high is not None),
        )


def _halves(optimum: Optimum) -> tuple[float, float]:
    low, high = optimum.cell
    assert low is not None and high is not None, "only optima inside their curves are on the line"
    return math.log(optimum.encoder / low), math.log(high / optimum.encoder)


def find_optima(study: Study, threshold: float = THRESHOLD, data: float | None = None, seed: int = 0) -> Optima:
    """Applies the 1% rule to every LLM of a study.

    Args:
        study: The results.
        threshold: The rule's.
        data: Samples or tokens at which to compare; the most that every LLM was given if left out.
        seed: Of the noisy copies.

    Raises:
        UserError: No LLM has a curve.
    """
    curves, warnings = curves_at(study, data)
    if not curves:
        amounts = ", ".join(format_size(amount) for amount in sorted({curve.data for curve in study.curves()}))
        raise UserError(
            f"{study.name} has no LLM with an encoder and one of twice its size at "
            f"{'any amount of data' if data is None else f'{format_size(data)} {study.data_unit}'}; "
            f"{f'curves are there at {amounts}' if amounts else 'train both'}"
        )
    found = tuple(find_optimum(curve, threshold) for curve in curves)
    noise, scale, told = _find_noise(study, curves)
    draws = () if scale is None else tuple(tuple(redraw(curve, scale, threshold, seed)) for curve in curves)
    warnings += told
    for optimum in found:
        warnings += [f"LLM {format_size(optimum.llm)}: {note}" for note in optimum.notes]
        at = {(cell.runs[0].encoder, cell.runs[0].shape) for cell in study.cells() if _is_on(optimum.curve, cell)}
        if len(at) > len(optimum.curve.cells):
            warnings.append(f"LLM {format_size(optimum.llm)}: of several shapes of one encoder size the best counts")
    return Optima(study, threshold, found, draws, noise, (*study.warnings, *warnings))


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


def find_optima_for(study: Study, llm: float, threshold: float = THRESHOLD, seed: int = 0) -> Optima:
    """The optima to recommend from: at the most data that a measured LLM was given, else that every LLM was given."""
    own = [curve.data for curve in study.curves() if abs(curve.llm / llm - 1) < SAME_LLM]
    return find_optima(study, threshold, max(own, default=None), seed)


def _is_on(curve: Curve, cell: Cell) -> bool:
    return (cell.runs[0].llm, cell.runs[0].data) == (curve.llm, curve.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """An encoder for an LLM."""

    llm: float
    encoder: float
    relation: str
    method: str
    """``rule`` for a measured LLM, ``line`` for another."""
    interval: Interval
    shape: Shape
    is_extrapolated: bool
    warnings: tuple[str, ...]


def recommend(optima: Optima, llm: float) -> Recommendation:
    """The encoder for an LLM.

    Raises:
        UserError: The LLM was not measured, and fewer than two optima are known to lay a line through.
    """
    index = next((i for i, found in enumerate(optima.found) if abs(found.llm / llm - 1) < SAME_LLM), None)
    if index is not None:
        found = optima.found[index]
        encoder, relation, interval = found.encoder, found.relation, optima.interval_of(index)
        warnings = _warn_of_rule(optima, index)
    else:
        line = optima.line
        if line is None:
            inside = sum(found.is_inside for found in optima.found)
            raise UserError(
                f"the study did not train an LLM of {format_size(llm)}, and a line to it needs 2 LLMs whose optimum "
                f"lies inside their curve, found {inside}; train more encoder sizes, or ask for one of "
                f"{', '.join(format_size(found.llm) for found in optima.found)}"
            )
        encoder, relation, interval = line.predict(llm), "equal", line.interval(llm)
        warnings = _warn_of_line(optima, line, llm)
    shape, of_shape = choose_shape(encoder)
    return Recommendation(
        llm=llm,
        encoder=encoder,
        relation=relation,
        method="line" if index is None else "rule",
        interval=interval,
        shape=shape,
        is_extrapolated=index is None and not _is_between(llm, optima),
        warnings=(*optima.warnings, *warnings, *of_shape),
    )


def _is_between(llm: float, optima: Optima) -> bool:
    line = optima.line
    return line is not None and min(line.llms) <= llm <= max(line.llms)


def _warn_of_rule(optima: Optima, index: int) -> list[str]:
    found, warnings = optima.found[index], []
    if found.relation == "at least":
        warnings.append(
            f"every doubling up to {format_size(found.encoder)} gains {optima.threshold:.0%} or more: the optimum is "
            "at least this; train larger encoders"
        )
    elif found.relation == "at most":
        warnings.append(
            f"already the first doubling from {format_size(found.encoder)} gains less than {optima.threshold:.0%}: the "
            "optimum is at most this; train smaller encoders"
        )
    agreement = optima.agreement(index)
    if agreement is not None and agreement < CONFIDENCE:
        kind = _NOISES[optima.noise]
        outside = "" if optima.are_draws_of_noise else "; the interval is that of the grid alone"
        warnings.append(f"under {kind} the rule gives the same encoder in {agreement:.0%} of draws{outside}")
    return warnings


def _warn_of_line(optima: Optima, line: Line, llm: float) -> list[str]:
    low, high = line.exponent_interval()
    warnings = [
        f"the exponent {line.exponent:.3f} comes from {len(line.llms)} points, each known to a step of its grid: "
        f"anything from {low:.2f} to {high:.2f} fits them"
    ]
    if not _is_between(llm, optima):
        ratio = max(min(line.llms) / llm, llm / max(line.llms))
        warnings.append(
            f"extrapolated: {format_size(llm)} is {ratio:.3g} times beyond the measured "
            f"{format_size(min(line.llms))} to {format_size(max(line.llms))}"
        )
    outside = [found for found in optima.found if not found.is_inside]
    if outside:
        sizes = ", ".join(f"{format_size(f.llm)} ({f.relation} {format_size(f.encoder)})" for f in outside)
        warnings.append(f"left out of the line, since their optimum is at an end of the curve: {sizes}")
    if len(line.llms) == 2:
        warnings.append("two points fit any line: nothing shows that the sizes follow one")
    return warnings
