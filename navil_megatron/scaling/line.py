"""The log-log line from LLM size to encoder size (the paper's figure 7), and how far it can be trusted.

Three things move the line: each optimum is known to a cell of its grid only; losses are noisy; the optima need not lie
on a line. Its interval is the widest of the three.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

CONFIDENCE = 0.95
UNIT = 1e9
"""Sizes of the line's formula are in billions."""


@dataclass(frozen=True, slots=True)
class Line:
    """``encoder = prefactor * llm ** exponent``, both in billions of parameters."""

    llms: tuple[float, ...]
    encoders: tuple[float, ...]
    halves: tuple[tuple[float, float], ...]
    """From each optimum to the lower and upper end of its cell, in log size."""
    draws: tuple[tuple[float, ...], ...] = ()
    """Optima of noisy copies of the study; none where the noise is not known."""

    @property
    def exponent(self) -> float:
        """Slope of the line."""
        return float(self._weights_of_slope() @ np.log(self.encoders))

    @property
    def prefactor(self) -> float:
        """Encoder size of a 1B LLM, in billions."""
        return self.predict(UNIT) / UNIT

    def predict(self, llm: float) -> float:
        """The encoder size for an LLM."""
        return math.exp(self._weights_at(llm) @ np.log(self.encoders))

    def exponent_interval(self) -> tuple[float, float]:
        """Of the slope."""
        return self._interval(self._weights_of_slope())

    def interval(self, llm: float) -> tuple[float, float]:
        """Of the encoder size for an LLM."""
        low, high = self._interval(self._weights_at(llm))
        return math.exp(low), math.exp(high)

    def _centred(self) -> np.ndarray:
        logs = np.log(self.llms)
        return np.asarray(logs - logs.mean())

    def _weights_of_slope(self) -> np.ndarray:
        """The slope of least squares is this times the optima's logs."""
        centred = self._centred()
        return np.asarray(centred / (centred @ centred))

    def _weights_at(self, llm: float) -> np.ndarray:
        """The line's height at an LLM is this times the optima's logs."""
        distance = math.log(llm) - float(np.log(self.llms).mean())
        return np.asarray(1 / len(self.llms) + distance * self._weights_of_slope())

    def _interval(self, weights: np.ndarray) -> tuple[float, float]:
        logs = np.log(self.encoders)
        value = float(weights @ logs)
        down, up = _cell_reach(weights, self.halves)
        misfit = self._misfit(weights)
        lows, highs = [value - down, value - misfit], [value + up, value + misfit]
        if self.draws:
            drawn = np.log(self.draws) @ weights
            tail = (1 - CONFIDENCE) / 2
            lows.append(float(np.quantile(drawn, tail)) - down)
            highs.append(float(np.quantile(drawn, 1 - tail)) + up)
        return min(lows), max(highs)

    def _misfit(self, weights: np.ndarray) -> float:
        """Half the interval of Student's t from the optima's distance to the line; 0 of two points, which fit any."""
        freedom = len(self.llms) - 2
        if freedom < 1:
            return 0.0
        fitted = np.array([self._weights_at(llm) @ np.log(self.encoders) for llm in self.llms])
        deviation = math.sqrt(float(((np.log(self.encoders) - fitted) ** 2).sum()) / freedom)
        return float(student.ppf((1 + CONFIDENCE) / 2, freedom)) * deviation * math.sqrt(float(weights @ weights))


def _cell_reach(weights: Sequence[float] | np.ndarray, halves: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """How far below and above a weighted sum of optima can be if each is anywhere in its cell.

    The worst case, not a standard error: the grid moves all optima at once.
    """
    pairs = list(zip(weights, halves, strict=True))
    down = sum(weight * (low if weight > 0 else -high) for weight, (low, high) in pairs)
    up = sum(weight * (high if weight > 0 else -low) for weight, (low, high) in pairs)
    return float(down), float(up)


def grid_factor(llms: Sequence[float], halves: Sequence[float], llm: float) -> float:
    """The log of the factor by which a recommendation can be off because the optima are known to grid cells only.

    Args:
        llms: LLM sizes with a curve, at least two.
        halves: Half the step of each curve's grid, in log size.
        llm: For which an encoder is recommended.
    """
    logs = np.log(llms)
    centred = logs - logs.mean()
    weights = 1 / len(llms) + (math.log(llm) - logs.mean()) * centred / (centred @ centred)
    return float(np.abs(weights) @ np.asarray(halves))
