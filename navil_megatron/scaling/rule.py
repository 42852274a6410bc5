"""The paper's 1% rule (section 3.3.2): the best encoder is the smallest whose loss differs from that of an encoder
twice its size by less than 1% of the loss with the smallest encoder.

"Smallest" is the smallest of the same LLM's curve: this is the reading that gives the optima of figure 7.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from navil_megatron.scaling.study import CONFIDENCE, SAME_SIZE, Curve

THRESHOLD = 0.01  # the paper's lambda
DRAWS = 1_000  # noisy copies of a curve to which the rule is applied again
Interval = tuple[float | None, float | None]  # encoder sizes; ``None``: no bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """What the rule chose for one LLM."""

    curve: Curve
    index: int
    """Of the encoder on the curve."""
    gains: tuple[float | None, ...]
    """Fall of the loss from doubling each encoder, in parts of the smallest encoder's loss; ``None``: not measured."""
    notes: tuple[str, ...] = ()
    drawn: tuple[int, ...] = ()
    """``index`` on noisy copies of the curve; empty where no noise is known."""
    is_widened: bool = False
    """Whether the copies widen the interval: the paper's optima are published, only their losses were read."""

    @property
    def llm(self) -> float:
        """Parameters of the LLM."""
        return self.curve.llm

    @property
    def encoder(self) -> float:
        """Parameters of the encoder."""
        return self.curve.encoders[self.index]

    @property
    def relation(self) -> str:
        """``equal``; ``at least`` where every measured doubling pays; ``at most`` where not even the first one does."""
        if self.gains[self.index] is None:
            return "at least"
        return "equal" if self.index else "at most"

    @property
    def is_inside(self) -> bool:
        """Whether the optimum lies inside its curve."""
        return self.relation == "equal"

    @property
    def cell(self) -> Interval:
        """Half a step of the grid to either side: 0.6B on a grid of doublings stands for 0.6B / sqrt 2 to 0.6B sqrt 2.

        Had the grid been shifted, the rule would have answered elsewhere; the mean of its answers lies in this cell.
        """
        sizes, at = self.curve.encoders, self.index
        low = None if self.relation == "at most" else math.sqrt(sizes[at] * sizes[at - 1])
        high = None if self.relation == "at least" else math.sqrt(sizes[at] * sizes[at + 1])
        return low, high

    @property
    def interval(self) -> Interval:
        """Where the optimum can be: its cell of the grid, and those that noise moves it to."""
        if not self.is_widened:
            return self.cell
        tail = round((1 - CONFIDENCE) / 2 * DRAWS)
        ordered = sorted(self.drawn)
        low, high = min(self.index, ordered[tail]), max(self.index, ordered[-1 - tail])
        return replace(self, index=low).cell[0], replace(self, index=high).cell[1]

    @property
    def agreement(self) -> float | None:
        """Share of noisy copies with the same optimum."""
        return self.drawn.count(self.index) / len(self.drawn) if self.drawn else None


def find_optimum(curve: Curve, threshold: float = THRESHOLD) -> Optimum:
    """Applies the rule to a curve."""
    gains, is_between = _gains(curve, np.array([curve.losses]))
    index = int(_choose(gains, threshold)[0])
    measured = tuple(None if math.isnan(gain) else gain for gain in gains[0].tolist())
    found = Optimum(curve=curve, index=index, gains=measured)
    notes = []
    if is_between[max(index - 1, 0) : index + 1].any():
        notes.append("an encoder of twice the size was not trained: its loss is interpolated in log size")
    later = [gain for gain in found.gains[index + 1 :] if gain is not None and gain >= threshold]
    if found.relation != "at least" and later:
        notes.append(
            f"a later doubling gains {max(later):.1%} again: the curve is not smooth, and the rule may stop early"
        )
    return replace(found, notes=tuple(notes))


def redraw(found: Optimum, noise: float, threshold: float = THRESHOLD, seed: int = 0) -> tuple[int, ...]:
    """The index that the rule chooses on each noisy copy of a curve.

    ``noise`` is the relative standard deviation of one run's loss; a mean over seeds has less.
    """
    generator = np.random.default_rng([seed, int(found.llm) % 2**32])
    scale = np.array([noise / math.sqrt(len(cell.runs)) for cell in found.curve.cells])
    copies = np.array(found.curve.losses) * (1 + scale * generator.standard_normal((DRAWS, len(scale))))
    return tuple(_choose(_gains(found.curve, copies)[0], threshold).tolist())


def _gains(curve: Curve, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What doubling each encoder gains, and where the loss of the doubled one is interpolated in log size, [encoders].

    Of losses [copies, encoders] the gains, alike, in parts of the smallest encoder's loss; NaN beyond the curve.
    """
    logs = np.log(curve.encoders)
    doubled = logs + math.log(2)
    nearest = logs[np.abs(logs - doubled[:, None]).argmin(axis=1)]
    is_measured = np.abs(nearest - doubled) < math.log(SAME_SIZE)
    at = np.where(is_measured, nearest, doubled)
    weights = [np.interp(at, logs, unit, right=np.nan) for unit in np.eye(len(logs))]
    return (losses - losses @ np.array(weights)) / losses[:, :1], ~is_measured & (at < logs[-1])


def _choose(gains: np.ndarray, threshold: float) -> np.ndarray:
    """Of each curve the first encoder whose doubling gains less than the threshold; where none does, the first whose
    doubling was not measured.
    """
    # Losses have three digits or so: a gain of exactly the threshold must not pass by the last bit.
    return np.asarray(((gains < threshold - 1e-12) | np.isnan(gains)).argmax(axis=1))
