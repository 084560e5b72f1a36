"""Cells in colours with their numbers in them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from lightning_merge.report.style import INK, bare, text_color


def draw_cells(
    axes: Axes, values: np.ndarray, scale: Normalize, cmap: str, digits: int | None, marked: np.ndarray | None = None
) -> Any:
    """Draw a matrix as cells, the first row on top; a cell without a number is hatched.

    Args:
        axes: Where to draw.
        values: ``(rows, columns)``; NaN where there is none.
        scale: The mapping of values to the range of the colour map.
        cmap: The colour map.
        digits: Digits behind the point of the numbers in the cells; None writes none.
        marked: Which cells are framed and bold, ``(rows, columns)``.

    Returns:
        The mesh, for a colour bar.
    """
    mesh = axes.pcolormesh(values, norm=scale, cmap=cmap, edgecolor="face", linewidth=0.3)
    for (row, column), value in np.ndenumerate(values):
        if not math.isfinite(value):
            hatched = Rectangle(
                (column, row), 1, 1, facecolor="none", edgecolor=INK, alpha=0.9, linewidth=0, hatch="////"
            )
            axes.add_patch(hatched)
        elif digits is not None:
            best = marked is not None and bool(marked[row, column])
            color = text_color(mesh.cmap(scale(value)))
            text = f"{round(float(value), digits) + 0.0:.{digits}f}"  # no -0.0
            weight = "bold" if best else "normal"
            axes.text(
                column + 0.5, row + 0.5, text, ha="center", va="center", color=color, fontsize=8, fontweight=weight
            )
            if best:
                frame = Rectangle((column + 0.04, row + 0.08), 0.92, 0.84, fill=False, edgecolor=color, linewidth=1.1)
                axes.add_patch(frame)
    axes.set(xlim=(0, values.shape[1]), ylim=(values.shape[0], 0))
    bare(axes)
    return mesh


def name_cells(axes: Axes, rows: list[str], columns: list[str], room: float) -> None:
    """Name the rows on the left and the columns above; tilted where they are longer than the room, in inches."""
    tilted = max(map(len, columns), default=0) > room / 0.07
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.tick_params(axis="x", top=True, bottom=False, labeltop=True, labelbottom=False)
    if tilted:
        for label in axes.get_xticklabels():
            label.set(rotation=35, ha="left", va="bottom", rotation_mode="anchor")


def scale_of(values: np.ndarray, limits: tuple[float, float] | None = None) -> Normalize:
    """Build a scale from the least to the largest finite value, or between limits; 0 to 100 where all are equal."""
    finite = values[np.isfinite(values)]
    low, high = limits or ((finite.min(), finite.max()) if finite.size else (0.0, 0.0))
    return Normalize(low, high) if high > low else Normalize(0, 100)
