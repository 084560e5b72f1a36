"""What experts and merged models did to each layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lightning_merge.analysis.comparison import Comparison
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

_LAYER = re.compile(r".*?\.\d+(?=\.)|[^.]+")


@dataclass
class _Layer:
    """The sums over the parameters of a layer, see :class:`ParameterComparison`."""

    products: np.ndarray
    moved: int = 0
    conflicts: int = 0
    merged_squares: dict[str, float] = field(default_factory=dict)
    merged_products: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def norms(self) -> np.ndarray:
        """The norms of the experts' task vectors ``(T,)``."""
        return np.sqrt(self.products.diagonal().clip(0))

    @property
    def cosine(self) -> float:
        """The mean cosine of two task vectors."""
        cosines = _ratio(self.products, np.outer(self.norms, self.norms))
        return float(cosines[~np.eye(len(cosines), dtype=bool)].mean())

    def merged_norm(self, name: str) -> float:
        """The norm of a merged update, divided by the mean of the experts'."""
        return float(_ratio(np.sqrt(max(self.merged_squares.get(name, np.nan), 0)), self.norms.mean()))

    def merged_cosine(self, name: str) -> float:
        """The mean cosine of a merged update and the task vectors."""
        products = self.merged_products.get(name, np.nan)
        return float(_ratio(products, self.norms * np.sqrt(self.merged_squares.get(name, np.nan))).mean())


def _ratio(value: Any, reference: Any) -> np.ndarray:
    """NaN where the reference is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(reference) > 0, np.divide(value, reference), np.nan)


@drawn
def plot_layers(comparison: Comparison, layer: str | None = None) -> Figure:
    """How far the experts went in each layer, where they fight, and what the merged models made of it.

    Panels: the norms of the task vectors; the norm of the merged updates, divided by the mean of these; entries on
    whose sign experts disagree; cosines between two task vectors, and between a merged update and the task vectors.

    Args:
        comparison: What was found.
        layer: What this regular expression matches at the beginning of a parameter's name is its layer; by default
            everything up to the first number (``backbone.blocks.3``), else the first part of the name.
    """
    layers = _sum_by_layer(comparison, re.compile(layer) if layer else _LAYER)
    values = list(layers.values())
    panels: list[Callable[[Axes], None]] = [lambda axes: _draw_norms(axes, values, comparison.experts)]
    if comparison.merged:
        panels.append(lambda axes: _draw_merged(axes, values, comparison.merged))
    if len(comparison.experts) > 1:
        panels.append(lambda axes: _draw_conflicts(axes, values))
    if len(comparison.experts) > 1 or comparison.merged:
        panels.append(lambda axes: _draw_cosines(axes, values, comparison))
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(WIDTH, 1.2 + 2.2 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).reshape(-1)
    for axes, draw in zip(grid, panels, strict=False):
        draw(axes)
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
    """How far every method moves every layer: the norm of its update, divided by the mean of the experts'.

    Args:
        ratios: For each method the ratio of every layer.
    """
    layers = list(dict.fromkeys(layer for own in ratios.values() for layer in own))
    values = np.array([[own.get(layer, np.nan) for layer in layers] for own in ratios.values()], dtype=float)
    figure = Figure(max(WIDTH, 3.0 + 0.4 * len(layers)), 1.4 + 0.26 * len(ratios))
    axes = figure.subplots()
    start = len(common_path(layers))
    high = max(1.0, float(np.nanquantile(values, 0.95))) if np.isfinite(values).any() else 1.0
    mesh = draw_cells(axes, values, scale_of(values, (0.0, high)), SEQUENTIAL, 1 if len(layers) <= 24 else None)
    name_cells(axes, [shown(name) for name in ratios], [shown(name[start:] or name, 24) for name in layers])
    figure.colorbar(mesh, ax=axes, label="update / experts' mean", shrink=min(1.0, 4 / len(ratios)), aspect=15)
    return figure


def _sum_by_layer(comparison: Comparison, layer: re.Pattern[str]) -> dict[str, _Layer]:
    count = len(comparison.experts)
    layers: dict[str, _Layer] = {}
    for parameter in comparison.parameters:
        found = layer.match(parameter.name)
        own = layers.setdefault(found[0] if found else parameter.name, _Layer(np.zeros((count, count))))
        own.products = own.products + parameter.products.double().numpy()
        own.moved += parameter.moved
        own.conflicts += parameter.conflicts
        for name, square in parameter.merged_squares.items():
            own.merged_squares[name] = own.merged_squares.get(name, 0.0) + square
        for name, products in parameter.merged_products.items():
            own.merged_products[name] = own.merged_products.get(name, 0.0) + products.double().numpy()
    return layers


def _draw_norms(axes: Axes, layers: Sequence[_Layer], experts: Sequence[str]) -> None:
    norms = np.stack([layer.norms for layer in layers], axis=1)  # (T, layers)
    name = "the experts" if len(experts) > 1 else shown(experts[0])
    for i, own in enumerate(norms):
        axes.plot(own, color=MUTED, linewidth=0.9, marker=".", markersize=3, label=name if i == 0 else None)
    axes.set_title("norm of the task vectors")
    axes.set_ylim(bottom=0)


def _draw_merged(axes: Axes, layers: Sequence[_Layer], merged: Sequence[str]) -> None:
    for name, look in zip(merged, looks(len(merged)), strict=True):
        axes.plot([layer.merged_norm(name) for layer in layers], marker="o", label=shown(name, 28), **look)
    axes.axhline(1, color=INK, linewidth=1, linestyle="--")
    axes.set_title("norm of merged update / experts' mean")
    axes.set_ylim(bottom=0)


def _draw_conflicts(axes: Axes, layers: Sequence[_Layer]) -> None:
    axes.bar(range(len(layers)), [100 * float(_ratio(n.conflicts, n.moved)) for n in layers], color=MUTED)
    axes.set_title("sign conflicts, % of what two experts moved")


def _draw_cosines(axes: Axes, layers: Sequence[_Layer], comparison: Comparison) -> None:
    if len(comparison.experts) > 1:
        axes.plot([layer.cosine for layer in layers], color=INK, linewidth=1.2, marker="o", label="between experts")
    for name, look in zip(comparison.merged, looks(len(comparison.merged)), strict=True):
        axes.plot([layer.merged_cosine(name) for layer in layers], marker="o", label=shown(name, 28), **look)
    axes.axhline(0, color=INK, linewidth=1, linestyle="--")
    axes.set_title("mean cosine with the experts")
