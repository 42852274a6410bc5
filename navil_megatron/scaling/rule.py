"""The paper's 1% rule (section 3.3.2): the best encoder is the smallest whose loss differs from that of an encoder
twice its size by less than 1% of the loss with the smallest encoder.

"Smallest" is the smallest of the same LLM's curve: this is the reading that gives the optima of figure 7.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from navil_megatron.scaling.study import SAME_SIZE, Curve

THRESHOLD = 0.01
"""The paper's lambda."""
DRAWS = 1_000
"""Noisy copies of a curve to which the rule is applied again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """What the rule chose for one LLM."""

    curve: Curve
    encoder: float
    relation: str
    """``equal``; ``at least`` where every measured doubling pays; ``at most`` where not even the first one does."""
    cell: tuple[float | None, float | None]
    """Encoder sizes that the grid cannot tell apart; ``None``: no bound."""
    gains: tuple[float | None, ...]
    """Fall of the loss from doubling each encoder, in parts of the smallest encoder's loss; ``None``: not measured."""
    notes: tuple[str, ...] = ()

    @property
    def llm(self) -> float:
        """Parameters of the LLM."""
        return self.curve.llm

    @property
    def is_inside(self) -> bool:
        """Whether the optimum lies inside its curve."""
        return self.relation == "equal"


def find_optimum(curve: Curve, threshold: float = THRESHOLD) -> Optimum:
    """Applies the rule to a curve."""
    doubling = _Doubling(curve.encoders)
    found = doubling.gains(np.array([curve.losses]))[0]
    gains = [None if math.isnan(gain) else float(gain) for gain in found]
    index = int(_choose(found[None], threshold)[0])
    relation = _relate(gains, index)
    notes = []
    if doubling.is_between[index] or (index and doubling.is_between[index - 1]):
        notes.append("an encoder of twice the size was not trained: its loss is interpolated in log size")
    later = [gain for gain in gains[index + 1 :] if gain is not None and gain >= threshold]
    if relation != "at least" and later:
        notes.append(
            f"a later doubling gains {max(later):.1%} again: the curve is not smooth, and the rule may stop early"
        )
    return Optimum(
        curve=curve,
        encoder=curve.encoders[index],
        relation=relation,
        cell=_cell(curve.encoders, index, relation),
        gains=tuple(gains),
        notes=tuple(notes),
    )


class _Doubling:
    """The loss of an encoder of twice the size, for each encoder of a curve, as a weighted sum of the losses."""

    def __init__(self, encoders: tuple[float, ...]) -> None:
        self.weights = np.zeros((len(encoders), len(encoders)))
        self.is_between = [False] * len(encoders)
        """Whether the loss of the doubled encoder is interpolated."""
        for index, encoder in enumerate(encoders):
            self._weigh(index, 2 * encoder, encoders)

    def _weigh(self, index: int, size: float, encoders: tuple[float, ...]) -> None:
        nearest = min(range(len(encoders)), key=lambda i: abs(math.log(encoders[i] / size)))
        if abs(math.log(encoders[nearest] / size)) < math.log(SAME_SIZE):
            self.weights[index, nearest] = 1.0
            return
        after = bisect_left(encoders, size)
        if after == len(encoders):
            self.weights[index] = np.nan
            return
        low, high = encoders[after - 1], encoders[after]
        share = math.log(size / low) / math.log(high / low)
        self.weights[index, after - 1 : after + 1] = 1 - share, share
        self.is_between[index] = True

    def gains(self, losses: np.ndarray) -> np.ndarray:
        """Fall of the loss from doubling each encoder, in parts of the smallest one's; NaN where it was not measured.

        Args:
            losses: ``[curves, encoders]``.
        """
        return np.asarray((losses - losses @ self.weights.T) / losses[:, :1])


def _choose(gains: np.ndarray, threshold: float) -> np.ndarray:
    """Of each curve the first encoder whose doubling gains less than the threshold; where none does, the first whose
    doubling was not measured.
    """
    # Losses have three digits or so: a gain of exactly the threshold must not pass by the last bit.
    passes = (gains < threshold - 1e-12) | np.isnan(gains)
    return np.asarray(passes.argmax(axis=1))


def _relate(gains: Sequence[float | None], index: int) -> str:
    """How the optimum relates to the encoder that was chosen."""
    if gains[index] is None:
        return "at least"
    return "at most" if index == 0 else "equal"


def _cell(encoders: tuple[float, ...], index: int, relation: str) -> tuple[float | None, float | None]:
    """Half a step of the grid to either side: 0.6B on a grid of doublings stands for 0.6B / sqrt 2 to 0.6B sqrt 2.

    Had the grid been shifted, the rule would have answered elsewhere; the mean of its answers lies in this cell.
    """
    low = None if relation == "at most" else math.sqrt(encoders[index] * encoders[index - 1])
    high = None if relation == "at least" else math.sqrt(encoders[index] * encoders[index + 1])
    return low, high


def redraw(curve: Curve, noise: float, threshold: float = THRESHOLD, seed: int = 0) -> list[Optimum]:
    """What the rule chooses on noisy copies of a curve.

    Args:
        curve: The measured curve.
        noise: Relative standard deviation of one run's loss; a mean over seeds has less.
        threshold: The rule's.
        seed: Of the draws.
    """
    generator = np.random.default_rng([seed, int(curve.llm) % 2**32])
    scale = np.array([noise / math.sqrt(len(cell.runs)) for cell in curve.cells])
    copies = np.array(curve.losses) * (1 + scale * generator.standard_normal((DRAWS, len(scale))))
    found = find_optimum(curve, threshold)
    indices = _choose(_Doubling(curve.encoders).gains(copies), threshold).tolist()
    answers = {index: _move(found, index) for index in set(indices)}
    return [answers[index] for index in indices]


def _move(found: Optimum, index: int) -> Optimum:
    """The optimum at another encoder of the same curve."""
    encoders, relation = found.curve.encoders, _relate(found.gains, index)
    return replace(found, encoder=encoders[index], relation=relation, cell=_cell(encoders, index, relation))
