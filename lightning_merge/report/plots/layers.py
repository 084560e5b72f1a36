"""Figures of layers: how far experts and merged models moved each of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from lightning_merge.analysis.comparison import Comparison
from lightning_merge.analysis.groups import GROUPS, grouped
from lightning_merge.report.plots.cells import draw_cells, name_cells, scale_of
from lightning_merge.report.style import (
    INK,
    MUTED,
    SEQUENTIAL,
    WIDTH,
    Figure,
    common_path,
    drawn,
    legend_below,
    looks,
    name_ticks,
    shown,
)

Names = Collection[str]


@drawn
def plot_layers(comparison: Comparison, pattern: str = GROUPS) -> Figure:
    """Draw how far the experts went in each layer, where they conflict, and what the merged models made of it.

    Panels: the norms of the task vectors; the norm of the merged updates, divided by the mean of these; entries on
    whose sign experts disagree; cosines between two task vectors, and between a merged update and the task vectors.

    Args:
        comparison: The experts and the merged models, compared.
        pattern: A regular expression, whose match at the beginning of a parameter's name is its layer; by default
            everything up to the first number (``backbone.blocks.3``), else the first part of the name.
    """
    layers = grouped(comparison.by_name, pattern)
    panels: list[Callable[[Axes, Comparison, Sequence[Names]], None]] = [_draw_norms]
    if comparison.merged:
        panels.append(_draw_merged)
    if len(comparison.experts) > 1:
        panels.append(_draw_conflicts)
    if len(comparison.experts) > 1 or comparison.merged:
        panels.append(_draw_cosines)
    columns = {3: 3}.get(len(panels), min(len(panels), 2))
    rows = -(-len(panels) // columns)
    figure = Figure(WIDTH, 1.2 + 2.2 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).reshape(-1)
    for axes, draw in zip(grid, panels, strict=False):
        draw(axes, comparison, list(layers.values()))
        axes.margins(y=0.08)
    for axes in grid[len(panels) :]:
        axes.remove()
    for i, axes in enumerate(grid[: len(panels)]):
        name_ticks(axes, list(layers), 14)
        axes.tick_params(labelbottom=i >= len(panels) - columns)
    legend_below(figure, grid)
    return figure


@drawn
def plot_updates(ratios: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw how far every method moves every layer: the norm of its update, divided by the mean of the experts'.

    Args:
        ratios: The ratio of every layer, by method.
    """
    layers = list(dict.fromkeys(layer for by_layer in ratios.values() for layer in by_layer))
    values = np.array([[by_layer.get(layer, np.nan) for layer in layers] for by_layer in ratios.values()], dtype=float)
    figure = Figure(max(WIDTH, 3.0 + 0.4 * len(layers)), 1.4 + 0.26 * len(ratios))
    axes = figure.subplots()
    start = len(common_path(layers))
    high = max(1.0, float(np.nanquantile(values, 0.95))) if np.isfinite(values).any() else 1.0
    mesh = draw_cells(axes, values, scale_of(values, (0.0, high)), SEQUENTIAL, 1 if len(layers) <= 24 else None)
    columns = [shown(name[start:] or name, 24) for name in layers]
    name_cells(axes, [shown(name) for name in ratios], columns, 4 / len(layers))
    figure.colorbar(mesh, ax=axes, label="update / experts' mean", shrink=min(1.0, 4 / len(ratios)), aspect=15)
    return figure


def _draw_norms(axes: Axes, comparison: Comparison, layers: Sequence[Names]) -> None:
    norms = np.stack([comparison.norms(names).numpy() for names in layers], axis=1)  # (T, layers)
    label = "the experts" if len(comparison.experts) > 1 else shown(comparison.experts[0])
    for i, by_layer in enumerate(norms):
        axes.plot(by_layer, color=MUTED, linewidth=0.9, marker=".", markersize=3, label=label if i == 0 else None)
    axes.set_title("norm of the task vectors")
    axes.set_ylim(bottom=0)


def _draw_merged(axes: Axes, comparison: Comparison, layers: Sequence[Names]) -> None:
    for name, look in zip(comparison.merged, looks(len(comparison.merged)), strict=True):
        ratios = [comparison.update_ratio(name, names) for names in layers]
        axes.plot(ratios, marker="o", label=shown(name, 28), **look)
    axes.axhline(1, color=INK, linewidth=1, linestyle="--")
    axes.set_title("norm of merged update / experts' mean")
    axes.set_ylim(bottom=0)


def _draw_conflicts(axes: Axes, comparison: Comparison, layers: Sequence[Names]) -> None:
    axes.bar(range(len(layers)), [100 * comparison.sign_conflict(names) for names in layers], color=MUTED)
    axes.set_title("opposite signs, % of entries")


def _draw_cosines(axes: Axes, comparison: Comparison, layers: Sequence[Names]) -> None:
    if len(comparison.experts) > 1:
        cosines = [comparison.mean_cosine(names) for names in layers]
        axes.plot(cosines, color=INK, linewidth=1.2, marker="o", label="between experts")
    for name, look in zip(comparison.merged, looks(len(comparison.merged)), strict=True):
        cosines = [float(comparison.merged_cosines(name, names).nanmean()) for names in layers]
        axes.plot(cosines, marker="o", label=shown(name, 28), **look)
    axes.axhline(0, color=INK, linewidth=1, linestyle="--")
    axes.set_title("mean cosine with the experts" if comparison.merged else "mean cosine between experts")
