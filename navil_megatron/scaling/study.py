"""The results of a study: runs, the cells of runs that differ by their seed alone, and loss curves over encoder sizes.

A cell is one LLM size, encoder size and amount of data; its loss is the mean over its seeds.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean

from navil_megatron.scaling.sizes import format_size

SAME_SIZE = 1.1
"""Sizes closer than this ratio are one size: the shapes that a depth and width study gives one encoder differ by 5%."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One trained model, or one of its checkpoints."""

    llm: float
    """Parameters of the LLM."""
    encoder: float
    """Parameters of the visual encoder."""
    data: float
    """Samples or tokens seen (``Study.data_unit``)."""
    loss: float
    """Validation loss."""
    where: str
    """File and line, or file and key."""
    seed: int | None = None
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    tags: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int | None, int | None, int | None]:
        """Depth, width and heads of the encoder; runs of several shapes are no repetitions of one another."""
        return self.depth, self.width, self.heads


@dataclass(frozen=True, slots=True)
class Cell:
    """Runs that differ by their seed alone."""

    runs: tuple[Run, ...]
    loss: float
    """Mean over the runs."""

    @property
    def spread(self) -> float | None:
        """Standard deviation over the runs; ``None`` of a single one."""
        if len(self.runs) < 2:
            return None
        return math.sqrt(sum((run.loss - self.loss) ** 2 for run in self.runs) / (len(self.runs) - 1))

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
    figures: dict[str, object] = field(default_factory=dict)
    """What a curves file holds beside its runs."""

    def cells(self) -> list[Cell]:
        """Cells in ascending order of LLM, encoder and data."""
        groups: dict[tuple[object, ...], list[Run]] = defaultdict(list)
        for run in self.runs:
            groups[(run.llm, run.encoder, run.data, *run.shape)].append(run)
        cells = [Cell(tuple(runs), fmean(run.loss for run in runs)) for runs in groups.values()]
        return sorted(cells, key=lambda cell: (cell.runs[0].llm, cell.runs[0].encoder, cell.runs[0].data, cell.where))

    def noise(self) -> float | None:
        """Relative standard deviation of a run's loss, pooled over the cells with several seeds."""
        repeated = [cell for cell in self.cells() if len(cell.runs) > 1]
        freedom = sum(len(cell.runs) - 1 for cell in repeated)
        if not freedom:
            return None
        return math.sqrt(sum((run.loss / cell.loss - 1) ** 2 for cell in repeated for run in cell.runs) / freedom)

    def curves(self) -> list[Curve]:
        """The curves in which at least one encoder size is doubled, in ascending order of LLM and data.

        Of several shapes of one size the best stands for it.
        """
        groups: dict[tuple[float, float], list[Cell]] = defaultdict(list)
        for cell in self.cells():
            groups[(cell.runs[0].llm, cell.runs[0].data)].append(cell)
        curves = []
        for (llm, data), cells in sorted(groups.items()):
            best = [min(same, key=lambda cell: cell.loss) for same in _same_size(cells)]
            encoders = tuple(cell.runs[0].encoder for cell in best)
            if encoders[-1] * SAME_SIZE > 2 * encoders[0]:
                curves.append(Curve(llm, data, encoders, tuple(best)))
        return curves


def _same_size(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells in groups of one encoder size."""
    groups: list[list[Cell]] = []
    for cell in cells:
        if groups and cell.runs[0].encoder < SAME_SIZE * groups[-1][0].runs[0].encoder:
            groups[-1].append(cell)
        else:
            groups.append([cell])
    return groups


def curves_at(study: Study, data: float | None) -> tuple[list[Curve], list[str]]:
    """One curve an LLM, at ``data`` or at the most data that every LLM was given; and what to warn of."""
    curves = study.curves()
    llms = sorted({curve.llm for curve in curves})
    warnings = [
        f"LLM {format_size(llm)} is left out: no two encoders, one twice the other's size, at any amount of data"
        for llm in sorted({run.llm for run in study.runs} - set(llms))
    ]
    if data is not None:
        near = [curve for curve in curves if math.isclose(curve.data, data, rel_tol=0.01)]
        nearest = {curve.llm: curve for curve in sorted(near, key=lambda curve: -abs(curve.data - data))}
        return [nearest[llm] for llm in sorted(nearest)], warnings
    amounts = {llm: {curve.data for curve in curves if curve.llm == llm} for llm in llms}
    shared = set.intersection(*amounts.values()) if amounts else set()
    if shared:
        chosen = {llm: max(shared) for llm in llms}
        most = max(max(each) for each in amounts.values())
        if most > max(shared):
            warnings.append(f"compared at {max(shared):g} {study.data_unit}, the most that every LLM was given")
    else:
        chosen = {llm: max(each) for llm, each in amounts.items()}
        if llms:
            warnings.append("no amount of data is shared by all LLMs: each is taken at its own largest")
    return [curve for curve in curves if curve.data == chosen[curve.llm]], warnings
