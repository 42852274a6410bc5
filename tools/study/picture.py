"""Pictures of a study after the paper's figures 2 to 4: loss over data, and loss over the encoder's depth."""

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator, ScalarFormatter

if TYPE_CHECKING:
    from tools.study.report import Runs

COLORS = ("#1f6fb4", "#d9730d", "#2e8b57", "#8e44ad", "#b03a48", "#607d8b")
STYLE = {"svg.hashsalt": "navil", "svg.fonttype": "path", "font.size": 10.0, "axes.grid": True, "grid.alpha": 0.25}


def draw_curves(arms: "dict[str, Runs]", grid: list[int], path: Path) -> None:
    """Held-out loss over samples: the mean of the seeds, and their range."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 4.2), layout="constrained")
        axes = figure.subplots()
        for color, (label, runs) in zip(COLORS, arms.items(), strict=False):
            places = np.geomspace(runs.first(), runs.last(), 80)
            losses = np.array([runs.losses(at) for at in places])
            axes.plot(places, losses.mean(axis=1), color=color, label=label)
            axes.fill_between(places, losses.min(axis=1), losses.max(axis=1), color=color, alpha=0.15, linewidth=0)
        _scales(axes, grid, "samples")
        figure.savefig(path, metadata={"Date": None})


def draw_shapes(arms: "dict[str, Runs]", grid: list[int], path: Path) -> None:
    """Held-out loss over the encoder's depth at equal parameters, a line for each amount of data."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 4.2), layout="constrained")
        axes = figure.subplots()
        depths = [runs.arm.depth for runs in arms.values()]
        for color, at in zip(COLORS, grid, strict=False):
            losses = [runs.losses(at) for runs in arms.values()]
            means = [fmean(each) for each in losses]
            reach = [
                [mean - min(each) for mean, each in zip(means, losses, strict=True)],
                [max(each) - mean for mean, each in zip(means, losses, strict=True)],
            ]
            axes.errorbar(depths, means, yerr=reach, color=color, marker="o", capsize=3, label=f"{at:,} samples")
        _scales(axes, depths, "depth of the encoder, at equal parameters")
        figure.savefig(path, metadata={"Date": None})


def _scales(axes: Axes, ticks: list[int], label: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    bottom, top = axes.get_ylim()
    shown = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0]
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in shown if bottom <= tick <= top]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    axes.set_ylabel("held-out loss, nats a token")
    axes.legend(frameon=False, fontsize=9)
