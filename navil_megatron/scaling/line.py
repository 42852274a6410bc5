"""The log-log line from LLM size to encoder size (the paper's figure 7), and how far it can be trusted.

Three things move the line: each optimum is known to a cell of its grid only; losses are noisy; the optima need not lie
on a line. Its interval is the widest of the three.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from navil_megatron.scaling.study import CONFIDENCE

UNIT = 1e9  # sizes of the line's formula are in billions


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
        return float(_slope(self.llms) @ np.log(self.encoders))

    @property
    def prefactor(self) -> float:
        """Encoder size of a 1B LLM, in billions."""
        return self.predict(UNIT) / UNIT

    def predict(self, llm: float) -> float:
        """The encoder size for an LLM."""
        return math.exp(_height(self.llms, llm) @ np.log(self.encoders))

    def exponent_interval(self) -> tuple[float, float]:
        """Of the slope."""
        return self._interval(_slope(self.llms))

    def interval(self, llm: float) -> tuple[float, float]:
        """Of the encoder size for an LLM."""
        low, high = self._interval(_height(self.llms, llm))
        return math.exp(low), math.exp(high)

    def _interval(self, weights: np.ndarray) -> tuple[float, float]:
        """Of a weighted sum of the optima's logs."""
        value = float(weights @ np.log(self.encoders))
        # The worst case of optima anywhere in their cells, not a standard error: the grid moves all of them at once.
        lower, upper = np.transpose(self.halves)
        down = float(weights @ np.where(weights > 0, lower, -upper))
        up = float(weights @ np.where(weights > 0, upper, -lower))
        misfit = self._misfit(weights)
        lows, highs = [value - down, value - misfit], [value + up, value + misfit]
        if self.draws:
            low, high = np.quantile(np.log(self.draws) @ weights, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
            lows.append(float(low) - down)
            highs.append(float(high) + up)
        return min(lows), max(highs)

    def _misfit(self, weights: np.ndarray) -> float:
        """Half the interval of Student's t from the optima's distance to the line; 0 of two points, which fit any."""
        freedom = len(self.llms) - 2
        if freedom < 1:
            return 0.0
        distances = np.log(self.encoders) - np.log([self.predict(llm) for llm in self.llms])
        deviation = math.sqrt(float(distances @ distances) / freedom)
        return float(student.ppf((1 + CONFIDENCE) / 2, freedom)) * deviation * math.sqrt(float(weights @ weights))


def _slope(llms: Sequence[float]) -> np.ndarray:
    """The slope of least squares is this times the logs of the encoders."""
    centred = np.log(llms) - np.log(llms).mean()
    return np.asarray(centred / (centred @ centred))


def _height(llms: Sequence[float], llm: float) -> np.ndarray:
    """The line's height at an LLM is this times the logs of the encoders."""
    return np.asarray(1 / len(llms) + (math.log(llm) - np.log(llms).mean()) * _slope(llms))


def grid_factor(llms: Sequence[float], halves: Sequence[float], llm: float) -> float:
    """The log of the factor by which a recommendation for ``llm`` can be off because of the grids.

    ``halves`` are half the step of the grid of each of ``llms``, two or more, in log size.
    """
    return float(np.abs(_height(llms, llm)) @ np.asarray(halves))
