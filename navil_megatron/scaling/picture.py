"""Pictures of a study, after the paper's figures 6 and 7: loss over encoder size, and the line of the optima."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from navil_megatron.scaling.recommend import Optima
from navil_megatron.scaling.sizes import format_size

_COLORS = ("#1f6fb4", "#d9730d", "#2e8b57", "#8e44ad", "#b03a48", "#607d8b")
_STYLE: Any = {
    "svg.hashsalt": "navil",
    "svg.fonttype": "path",
    "font.size": 10.0,
    "axes.grid": True,
    "grid.alpha": 0.25,
}
_INK = "#263238"
_ROOM = 1.35


def draw_study(optima: Optima, path: Path, llm: float | None = None) -> None:
    """Writes the picture; its format follows the file's suffix.

    Args:
        optima: Of every LLM.
        path: A .svg or .png file.
        llm: One more LLM to mark on the line.
    """
    with matplotlib.rc_context(_STYLE):
        panels = 1 if optima.line is None else 2
        figure = Figure(figsize=(5.6 * panels, 4.4), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _draw_curves(axes[0], optima)
        if panels == 2:
            _draw_line(axes[1], optima, llm)
        # Without the date, the same study gives the same file.
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_curves(axes: Axes, optima: Optima) -> None:
    """Each LLM's losses with the seeds' spread; a ring around what the rule chose."""
    for color, found in zip(_cycle(len(optima.found)), optima.found, strict=True):
        curve = found.curve
        spreads = [cell.spread or 0.0 for cell in curve.cells]
        axes.errorbar(
            curve.encoders,
            curve.losses,
            yerr=spreads if any(spreads) else None,
            color=color,
            marker="o",
            markersize=4,
            capsize=3,
            label=f"LLM {format_size(found.llm)}",
        )
        sign = {"equal": "", "at least": "≥ ", "at most": "≤ "}[found.relation]
        loss = curve.losses[curve.encoders.index(found.encoder)]
        axes.plot([found.encoder], [loss], "o", color=color, markersize=12, fillstyle="none", markeredgewidth=1.6)
        axes.annotate(
            f"{sign}{format_size(found.encoder)}",
            (found.encoder, loss),
            xytext=(0, 10),
            textcoords="offset points",
            ha="center",
            color=color,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _mark_sizes(axes, "x", [encoder for found in optima.found for encoder in found.curve.encoders])
    losses = [loss for found in optima.found for loss in found.curve.losses]
    axes.yaxis.set_major_locator(
        FixedLocator([tick for tick in MaxNLocator(7).tick_values(min(losses), max(losses)) if tick > 0])
    )
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("encoder parameters")
    axes.set_ylabel("validation loss")
    amounts = " to ".join(dict.fromkeys(format_size(amount) for amount in (optima.data[0], optima.data[-1])))
    axes.set_title(
        f"loss at {amounts} {optima.study.data_unit}; ring: optimum by the {optima.threshold:.0%} rule",
        fontsize=9,
    )
    axes.margins(x=0.1, y=0.12)
    axes.legend(frameon=False, fontsize=9)


def _draw_line(axes: Axes, optima: Optima, llm: float | None) -> None:
    """Optima with their cells, the line and its interval."""
    line = optima.line
    assert line is not None, "drawn only where there is a line"
    sizes = [found.llm for found in optima.found] + ([llm] if llm else [])
    grid = np.geomspace(min(sizes) / _ROOM, max(sizes) * _ROOM, 60).tolist()
    low, high = zip(*(line.interval(size) for size in grid), strict=True)
    axes.fill_between(grid, low, high, color=_COLORS[0], alpha=0.15, linewidth=0, label="interval")
    label = f"{line.prefactor:.3g} N$^{{{line.exponent:.3f}}}$, N in billions"
    axes.plot(grid, [line.predict(size) for size in grid], color=_COLORS[0], label=label)
    low_exponent, high_exponent = line.exponent_interval()
    for index, found in enumerate(optima.found):
        bottom, top = optima.interval_of(index)
        marker = {"equal": "o", "at least": "^", "at most": "v"}[found.relation]
        _draw_reach(axes, found.llm, found.encoder, bottom, top)
        axes.plot([found.llm], [found.encoder], marker, color=_INK)
    if llm is not None:
        word = f"{format_size(llm)} LLM: {format_size(line.predict(llm))}"
        axes.plot([llm], [line.predict(llm)], "*", color=_COLORS[1], markersize=13, label=word)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _mark_sizes(axes, "x", sizes)
    _mark_sizes(axes, "y", [found.encoder for found in optima.found])
    axes.set_xlabel("LLM parameters")
    axes.set_ylabel("optimal encoder parameters")
    axes.set_title(f"exponent {line.exponent:.2f}, anything from {low_exponent:.2f} to {high_exponent:.2f}", fontsize=9)
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _draw_reach(axes: Axes, llm: float, encoder: float, low: float | None, high: float | None) -> None:
    """The interval of an optimum; an arrow where it has no end."""
    down = encoder / 2 if low is None else encoder - low
    up = encoder if high is None else high - encoder
    axes.errorbar([llm], [encoder], yerr=np.array([[down], [0]]), uplims=low is None, color=_INK, capsize=3)
    axes.errorbar([llm], [encoder], yerr=np.array([[0], [up]]), lolims=high is None, color=_INK, capsize=3)


def _cycle(count: int) -> list[str]:
    return [_COLORS[i % len(_COLORS)] for i in range(count)]


def _mark_sizes(axes: Axes, name: str, sizes: Sequence[float]) -> None:
    """Ticks at the sizes themselves, thinned where they would touch."""
    kept: list[float] = []
    span = np.log(max(sizes) / min(sizes)) or 1.0
    for size in sorted(set(sizes)):
        if not kept or np.log(size / kept[-1]) > span / 9:
            kept.append(size)
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(kept))
    axis.set_major_formatter(FuncFormatter(lambda size, _: format_size(size)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())
