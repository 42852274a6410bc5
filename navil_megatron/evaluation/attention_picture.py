"""Attention to an image as a picture: the share it gets layer by layer, and where in the image it goes."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from navil_megatron.evaluation.attention import ImageAttention

_INK, _HEAT = "#263238", "#d8260b"
_STRONGEST = 0.8  # opacity where a map has most
_MAPS_IN_A_ROW = 4


def draw_attention(
    found: ImageAttention, image: Image.Image, layers: Sequence[int], scales: Sequence[int], title: str, output: Path
) -> None:
    """A curve over all layers, and a heat map over the image for each chosen layer and scale, as .svg or .png."""
    columns = min(_MAPS_IN_A_ROW, len(layers))
    lines = -(-len(layers) // columns)
    height = 2.7 * min(max(image.height / image.width, 0.3), 2) + 0.3
    num_rows = 1 + lines * len(scales)
    figure = Figure(figsize=(2.7 * columns + 1.3, 2.8 + (num_rows - 1) * height), layout="constrained")
    grid = figure.add_gridspec(num_rows, columns, height_ratios=[2.4, *[height] * (num_rows - 1)])
    figure.suptitle(title, fontsize=10)
    _draw_shares(figure.add_subplot(grid[0, :]), found)
    for block, scale in enumerate(scales):
        for number, layer in enumerate(layers):
            row, column = divmod(number, columns)
            _draw_map(figure.add_subplot(grid[1 + block * lines + row, column]), found, image, layer, scale)
    with matplotlib.rc_context({"svg.hashsalt": "navil"}):
        figure.savefig(output, dpi=130, metadata={"Date": None} if output.suffix == ".svg" else None)


def _draw_shares(axes: Axes, found: ImageAttention) -> None:
    """Percent by layer, scale on scale."""
    layers = np.arange(len(found.maps))
    shares = np.array([[100 * float(scale.sum()) for scale in maps] for maps in found.maps]).T
    colors = matplotlib.colormaps["Blues"](np.linspace(0.35, 0.85, len(shares)))
    names = [f"scale of {grid.shape[0]} x {grid.shape[1]} tokens" for grid in found.maps[0]]
    axes.stackplot(layers, shares, labels=names, colors=colors)
    axes.plot(layers, shares.sum(0), color=_INK, marker="o", markersize=3, linewidth=1)
    axes.set(xlabel="layer", ylabel="attention to the image, %", ylim=(0, None))
    axes.set_xlim(0, max(1, len(layers) - 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7, loc="best")


def _draw_map(axes: Axes, found: ImageAttention, image: Image.Image, layer: int, scale: int) -> None:
    """The image in grey, the redder the more attention, up to the most of this map; what the picture does not cover of
    a scale's tokens is cut off.
    """
    heat = found.maps[layer][scale]
    height, width = found.covered[scale]
    axes.imshow(image.convert("L"), cmap="gray", extent=(0, width, height, 0), vmin=0, vmax=255)
    strength = heat / max(float(heat.max()), 1e-30)
    tint = np.broadcast_to(to_rgba(_HEAT), (*heat.shape, 4)).copy()
    tint[..., 3] = _STRONGEST * strength
    axes.imshow(tint, extent=(0, heat.shape[1], heat.shape[0], 0))
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.set_title(f"layer {layer}, {heat.shape[0]} x {heat.shape[1]}: {100 * heat.sum():.1f}%", fontsize=8)
