"""The results of a study: runs, the cells of runs that differ by their seed alone, and loss curves over encoder sizes.

A cell is one LLM size, encoder size and amount of data; its loss is the mean over its seeds.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from navil_megatron.scaling.sizes import format_size

CONFIDENCE = 0.95  # of every interval
SAME_SIZE = 1.1
"""Sizes closer than this ratio are one size: the shapes that a depth and width study gives one encoder differ by 5%."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One trained model, or one of its checkpoints."""

    llm: float
    encoder: float
    data: float
    """Samples or tokens seen (``Study.data_unit``)."""
    loss: float
    where: str
    """File and line, or file and key."""
    seed: int | None = None
    shape: tuple[int | None, int | None, int | None] = (None, None, None)
    """Depth, width and heads of the encoder; runs of several shapes are no repetitions of one another."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Runs that differ by their seed alone."""

    runs: tuple[Run, ...]
    loss: float  # mean over the runs

    @property
    def spread(self) -> float | None:
        """Standard deviation over the runs; ``None`` of a single one."""
        return stdev(run.loss for run in self.runs) if len(self.runs) > 1 else None

    @property
    def where(self) -> str:
        """Where its first run was read."""
        return self.runs[0].where


@dataclass(frozen=True, slots=True)
class Curve:
    """Loss over encoder sizes, ascending, of one LLM at one amount of data."""

    llm: float
    data: float
    encoders: tuple[float, ...]
    cells: tuple[Cell, ...]

    @property
    def losses(self) -> tuple[float, ...]:
        """Mean loss of each encoder size."""
        return tuple(cell.loss for cell in self.cells)


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Every run, and what is known about them."""

    name: str
    runs: tuple[Run, ...]
    data_unit: str = "samples"
    """``samples`` or ``tokens``."""
    reading_error: float | None = None
    """Relative error of losses that were read off a picture."""
    warnings: tuple[str, ...] = ()
    inconsistencies: tuple[dict[str, Any], ...] = ()
    """Where a paper's figures contradict one another, as ``paper.py`` finds it."""

    def cells(self) -> list[Cell]:
        """Cells in ascending order of LLM, encoder and data."""
        groups: dict[tuple[object, ...], list[Run]] = defaultdict(list)
        for run in self.runs:
            groups[run.llm, run.encoder, run.data, run.shape].append(run)
        cells = [Cell(tuple(runs), fmean(run.loss for run in runs)) for runs in groups.values()]
        return sorted(cells, key=lambda cell: (cell.runs[0].llm, cell.runs[0].encoder, cell.runs[0].data, cell.where))

    def noise(self) -> float | None:
        """Relative standard deviation of a run's loss, pooled over the cells with several seeds."""
        cells = self.cells()
        freedom = len(self.runs) - len(cells)
        if not freedom:
            return None
        return math.sqrt(sum((run.loss / cell.loss - 1) ** 2 for cell in cells for run in cell.runs) / freedom)

    def curves(self) -> list[Curve]:
        """The curves in which at least one encoder size is doubled, in ascending order of LLM and data.

        Of several shapes of one size the best stands for it.
        """
        groups: dict[tuple[float, float], list[list[Cell]]] = defaultdict(list)
        for cell in self.cells():
            sizes = groups[cell.runs[0].llm, cell.runs[0].data]
            if sizes and cell.runs[0].encoder < SAME_SIZE * sizes[-1][0].runs[0].encoder:
                sizes[-1].append(cell)
            else:
                sizes.append([cell])
        curves = []
        for (llm, data), sizes in sorted(groups.items()):
            best = tuple(min(same, key=lambda cell: cell.loss) for same in sizes)
            encoders = tuple(cell.runs[0].encoder for cell in best)
            if encoders[-1] * SAME_SIZE > 2 * encoders[0]:
                curves.append(Curve(llm, data, encoders, best))
        return curves


def curves_at(study: Study, data: float | None) -> tuple[list[Curve], list[str]]:
    """One curve an LLM, at ``data`` or at the most data that every LLM was given; and what to warn of."""
    curves = study.curves()
    amounts = {curve.llm: {each.data for each in curves if each.llm == curve.llm} for curve in curves}
    warnings = [
        f"LLM {format_size(llm)} is left out: no two encoders, one twice the other's size, at any amount of data"
        for llm in sorted({run.llm for run in study.runs} - set(amounts))
    ]
    if data is not None:
        near = [curve for curve in curves if math.isclose(curve.data, data, rel_tol=0.01)]
        nearest = {curve.llm: curve for curve in sorted(near, key=lambda curve: -abs(curve.data - data))}
        return [nearest[llm] for llm in sorted(nearest)], warnings
    shared = max(set.intersection(*amounts.values()), default=None) if amounts else None
    if shared is not None:
        if any(curve.data > shared for curve in curves):
            warnings.append(f"compared at {shared:g} {study.data_unit}, the most that every LLM was given")
        return [curve for curve in curves if curve.data == shared], warnings
    if curves:
        warnings.append("no amount of data is shared by all LLMs: each is taken at its own largest")
    return [curve for curve in curves if curve.data == max(amounts[curve.llm])], warnings
