"""Pictures of a study, after the paper's figures 6 and 7: loss over encoder size, and the line of the optima."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, Formatter, FuncFormatter, MaxNLocator, NullLocator, ScalarFormatter

from navil_megatron.scaling.line import Line
from navil_megatron.scaling.recommend import Optima
from navil_megatron.scaling.sizes import format_size

_COLORS = ("#1f6fb4", "#d9730d", "#2e8b57", "#8e44ad", "#b03a48", "#607d8b")
_STYLE: Any = {"svg.hashsalt": "navil", "svg.fonttype": "path", "font.size": 10, "axes.grid": True, "grid.alpha": 0.25}
_INK = "#263238"
_ROOM = 1.35


def draw_study(optima: Optima, path: Path, llm: float | None = None) -> None:
    """Writes the picture, an .svg or .png file; ``llm`` is one more LLM to mark on the line."""
    with matplotlib.rc_context(_STYLE):
        panels = 1 if optima.line is None else 2
        figure = Figure(figsize=(5.6 * panels, 4.4), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _draw_curves(axes[0], optima)
        if optima.line is not None:
            _draw_line(axes[1], optima, optima.line, llm)
        # Without the date, the same study gives the same file.
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_curves(axes: Axes, optima: Optima) -> None:
    """Each LLM's losses with the seeds' spread; a ring around what the rule chose."""
    for color, found in zip(cycle(_COLORS), optima.found, strict=False):
        curve, loss = found.curve, found.curve.losses[found.index]
        spreads = [cell.spread or 0.0 for cell in curve.cells]
        bars, label = spreads if any(spreads) else None, f"LLM {format_size(found.llm)}"
        axes.errorbar(curve.encoders, curve.losses, bars, color=color, marker="o", markersize=4, capsize=3, label=label)
        axes.plot([found.encoder], [loss], "o", color=color, markersize=12, fillstyle="none", markeredgewidth=1.6)
        sign = {"equal": "", "at least": "≥ ", "at most": "≤ "}[found.relation]
        name, at = f"{sign}{format_size(found.encoder)}", (found.encoder, loss)
        axes.annotate(name, at, xytext=(0, 10), textcoords="offset points", ha="center", color=color)
    amounts = " to ".join(dict.fromkeys(format_size(amount) for amount in (optima.data[0], optima.data[-1])))
    title = f"loss at {amounts} {optima.study.data_unit}; ring: optimum by the {optima.threshold:.0%} rule"
    axes.set(xscale="log", yscale="log", xlabel="encoder parameters", ylabel="validation loss")
    axes.set_title(title, fontsize=9)
    _mark_sizes(axes.xaxis, [encoder for found in optima.found for encoder in found.curve.encoders])
    losses = [loss for found in optima.found for loss in found.curve.losses]
    ticks = MaxNLocator(7).tick_values(min(losses), max(losses))
    _mark(axes.yaxis, [tick for tick in ticks if tick > 0], ScalarFormatter())
    axes.margins(x=0.1, y=0.12)
    axes.legend(frameon=False, fontsize=9)


def _draw_line(axes: Axes, optima: Optima, line: Line, llm: float | None) -> None:
    """Optima with their cells, the line and its interval."""
    sizes = [found.llm for found in optima.found] + ([llm] if llm else [])
    grid = np.geomspace(min(sizes) / _ROOM, max(sizes) * _ROOM, 60).tolist()
    low, high = zip(*(line.interval(size) for size in grid), strict=True)
    axes.fill_between(grid, low, high, color=_COLORS[0], alpha=0.15, linewidth=0, label="interval")
    label = f"{line.prefactor:.3g} N$^{{{line.exponent:.3f}}}$, N in billions"
    axes.plot(grid, [line.predict(size) for size in grid], color=_COLORS[0], label=label)
    for found in optima.found:
        # An arrow where the interval has no end.
        bottom, top = found.interval
        down = found.encoder - (bottom or found.encoder / 2)
        up = (top or 2 * found.encoder) - found.encoder
        marker = {"equal": "o", "at least": "^", "at most": "v"}[found.relation]
        at = [found.llm], [found.encoder]
        axes.errorbar(*at, yerr=np.array([[down], [0]]), uplims=bottom is None, color=_INK, capsize=3)
        axes.errorbar(*at, yerr=np.array([[0], [up]]), lolims=top is None, color=_INK, capsize=3)
        axes.plot(*at, marker, color=_INK)
    if llm is not None:
        word = f"{format_size(llm)} LLM: {format_size(line.predict(llm))}"
        axes.plot([llm], [line.predict(llm)], "*", color=_COLORS[1], markersize=13, label=word)
    lowest, highest = line.exponent_interval()
    axes.set(xscale="log", yscale="log", xlabel="LLM parameters", ylabel="optimal encoder parameters")
    axes.set_title(f"exponent {line.exponent:.2f}, anything from {lowest:.2f} to {highest:.2f}", fontsize=9)
    _mark_sizes(axes.xaxis, sizes)
    _mark_sizes(axes.yaxis, [found.encoder for found in optima.found])
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _mark_sizes(axis: Axis, sizes: Sequence[float]) -> None:
    """Ticks at the sizes themselves, thinned where they would touch."""
    kept: list[float] = []
    span = np.log(max(sizes) / min(sizes)) or 1.0
    for size in sorted(set(sizes)):
        if not kept or np.log(size / kept[-1]) > span / 9:
            kept.append(size)
    _mark(axis, kept, FuncFormatter(lambda size, _: format_size(size)))


def _mark(axis: Axis, ticks: Sequence[float], formatter: Formatter) -> None:
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(formatter)
    axis.set_minor_locator(NullLocator())
