"""Figures of models on data: accuracy in a plane, activations site by site, features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from lightning_merge.analysis.activations import SiteDifference
from lightning_merge.analysis.landscape import Landscape, Plane
from lightning_merge.report.style import (
    INK,
    SEQUENTIAL,
    WIDTH,
    Figure,
    colors,
    drawn,
    legend_below,
    looks,
    name_ticks,
    plain_log,
    shown,
)


def plot_landscape(landscape: Landscape, plane: Plane, scale: float | None = None) -> Figure:
    """Draw the normalized accuracy in the plane of two task vectors: the average and the worst task.

    Args:
        landscape: The accuracies on a grid in the plane.
        plane: The plane; the base (θ) and both experts (1 and 2) are marked.
        scale: The coefficient of Task Arithmetic whose model is marked, too (TA).
    """
    return plot_landscapes({"": (landscape, plane)}, scale)


@drawn
def plot_landscapes(
    found: Mapping[str, tuple[Landscape, Plane]], scale: float | None = None, title: str = ""
) -> Figure:
    """Draw several landscapes side by side, the average above and the worst task below (Figure 1 of arXiv 2410.12766).

    Args:
        found: The landscape and its plane, by name. A single one is laid out in one row.
        scale: The coefficient of Task Arithmetic whose model is marked, too (TA).
        title: The title of the figure.
    """
    rows, columns = (1, 2) if len(found) == 1 else (2, len(found))
    figure = Figure(max(WIDTH, 2.4 * columns), 0.5 + 2.4 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    order = panels.T.reshape(-1) if rows == 2 else panels[0]
    parts = [(name, part, *pair) for name, pair in found.items() for part in ("average", "worst")]
    for axes, (name, part, measured, plane) in zip(order, parts, strict=True):
        values = getattr(measured, part)
        extent = [float(end) for axis in (measured.xs, measured.ys) for end in (axis[0], axis[-1])]
        image = axes.imshow(
            values.numpy(), origin="lower", extent=extent, vmin=0, vmax=1, interpolation="bilinear", cmap=SEQUENTIAL
        )
        places = {"θ": (0.0, 0.0), "1": plane.expert_1, "2": plane.expert_2}
        places |= {} if scale is None else {"TA": plane.task_arithmetic(scale)}
        for label, place in places.items():
            axes.plot(*place, "o", color="white", markersize=4, markeredgecolor="#111111", markeredgewidth=0.8)
            box = {"facecolor": "#111111", "alpha": 0.55, "edgecolor": "none", "boxstyle": "round,pad=0.15"}
            axes.annotate(label, place, (4, 4), textcoords="offset points", color="white", fontsize=7.5, bbox=box)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        highest = (
            f"{'average' if part == 'average' else 'worst task'}, at most {np.nanmax(values.numpy(), initial=0):.2f}"
        )
        axes.set_title(f"{shown(name, 30)}\n{highest}" if name else highest, fontsize=9)
    figure.colorbar(image, ax=panels, label="accuracy / the expert's", shrink=0.85, aspect=25)
    figure.suptitle(shown(title, 90))
    return figure


@drawn
def plot_variance_ratio(found: Mapping[str, Sequence[SiteDifference]], title: str = "") -> Figure:
    """Draw models' distance to an expert at every site, and the variance that is left (Figure 3 of arXiv 2410.12766).

    Args:
        found: The records of :func:`lightning_merge.analysis.compare_activations`, by model.
        title: The title of the figure.
    """
    sites = list(dict.fromkeys(record.site.name for records in found.values() for record in records))
    figure = Figure(WIDTH, 3.6)
    distance, ratio = figure.subplots(1, 2)
    for (name, records), look in zip(found.items(), looks(len(found)), strict=True):
        xs = [sites.index(record.site.name) for record in records]
        distance.plot(xs, [record.relative_distance for record in records], marker="o", label=shown(name), **look)
        ratio.plot(xs, [record.variance_ratio for record in records], marker="o", label=shown(name), **look)
    distance.set(ylabel="distance to the expert / its norm", ylim=(0, None))
    ratio.set(ylabel="variance / that of the expert", yscale="log")
    plain_log(ratio.yaxis, (1, 2, 5))
    ratio.axhline(1, color=INK, linewidth=1, linestyle="--")
    for axes in (distance, ratio):
        name_ticks(axes, sites)
    legend_below(figure, [distance])
    figure.suptitle(shown(title, 90))
    return figure


@drawn
def plot_embeddings(places: Mapping[str, Tensor], labels: Tensor | None = None, title: str = "") -> Figure:
    """Draw the features of several models in one plane, a panel each, in the colours of the classes.

    Args:
        places: The points of each model ``(N, 2)``, see :func:`lightning_merge.analysis.project`.
        labels: The classes ``(N,)``.
        title: The title of the figure.
    """
    columns = min(len(places), 4)
    rows = -(-len(places) // columns)
    figure = Figure(WIDTH, 0.4 + 1.9 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).reshape(-1)
    classes = [None] if labels is None else labels.unique().tolist()
    for axes, (name, points) in zip(panels, places.items(), strict=False):
        for label, color in zip(classes, colors(len(classes)), strict=True):
            of_class = points if label is None else points[labels == label]
            axes.scatter(
                *of_class.T.numpy(), color=color, s=5, linewidths=0, rasterized=len(points) > 2000, label=label
            )
        axes.set(title=shown(name, 28), xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
        axes.spines[:].set_alpha(0.4)
    for axes in panels[len(places) :]:
        axes.remove()
    if 1 < len(classes) <= 20:
        legend_below(figure, panels[:1], 10, markerscale=2)
    figure.suptitle(shown(title, 90))
    return figure
