"""Figures of matrices: where the experts' task matrices agree and where they conflict."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LogNorm
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from lightning_merge.analysis.comparison import mean_of_pairs
from lightning_merge.analysis.records import MatrixComparison
from lightning_merge.report.plots.cells import draw_cells, name_cells, scale_of
from lightning_merge.report.style import (
    DIVERGING,
    MUTED,
    SEQUENTIAL,
    WIDTH,
    Figure,
    bare,
    drawn,
    legend_below,
    looks,
    plain_log,
    shown,
    whole,
)

_PIXELS = 192  # a side of a map; of what falls into one pixel the largest is shown
_DECADES = 4  # what is smaller than the largest value by more is not told apart


@drawn
def plot_alignment(
    matrix: Tensor,
    names: Sequence[str],
    label: str = "subspace alignment ratio",
    limits: tuple[float, float] = (0.0, 1.0),
    directed: bool = True,
) -> Figure:
    """Draw a number for every pair of experts: alignment ratios, cosines, angles.

    Args:
        matrix: ``(T, T)``; NaN where there is none.
        names: The names of the experts.
        label: The name of the numbers.
        limits: The ends of the colours; from below zero on, two colours part at zero: give ``(-1, 1)`` for cosines.
        directed: Whether ``[i, j]`` says how much of expert i lies in the subspace of expert j, and not what both have.
    """
    values = np.asarray(matrix.detach().double().cpu())
    count = len(names)
    side = min(7.0, 1.4 + 0.55 * max(count, 2))
    figure = Figure(min(WIDTH + 1, side + 2.6), side)
    axes = figure.subplots()
    cmap = DIVERGING if limits[0] < 0 else SEQUENTIAL
    mesh = draw_cells(axes, values, scale_of(values, limits), cmap, 2 if count <= 12 else None)
    labels = [shown(name, 28) for name in names]
    name_cells(axes, labels, labels, min(0.66, 5.6 / count))
    axes.set_aspect("equal")
    if directed:
        axes.set(xlabel="in the subspace of …", ylabel="how much of …")
    figure.colorbar(mesh, ax=axes, label=label, shrink=0.8, aspect=18)
    return figure


@drawn
def plot_spectra(matrices: Sequence[MatrixComparison], experts: Sequence[str]) -> Figure:
    """Draw the singular values of the experts' task matrices, and those of the merged updates, in order of size.

    Args:
        matrices: The matrices, a panel each; :func:`choose_matrices` finds telling ones.
        experts: The names of the experts, whose lines are thin.
    """
    columns = max(1, min(len(matrices), 3))
    rows = -(-max(len(matrices), 1) // columns)
    figure = Figure(WIDTH, 0.6 + 2.7 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axes, matrix in zip(panels, matrices, strict=False):
        for i, spectrum in enumerate(matrix.spectra):
            label = f"the {len(experts)} experts" if len(experts) > 1 else shown(experts[0])
            axes.plot(*_ranked(spectrum), color=MUTED, linewidth=0.9, label=label if i == 0 else None)
        for (name, spectrum), look in zip(
            matrix.merged_spectra.items(), looks(len(matrix.merged_spectra)), strict=True
        ):
            axes.plot(*_ranked(spectrum), label=shown(name, 28), **look)
        largest = max(
            (float(s.max()) for s in (matrix.spectra, *matrix.merged_spectra.values()) if s.numel()), default=0
        )
        if largest > 0:
            axes.set_yscale("log")
            plain_log(axes.yaxis)
            axes.set_ylim(largest * 10.0**-_DECADES, 1.5 * largest)
        axes.set_title(_title(matrix))
        axes.set_xlabel("index")
        whole(axes.xaxis)
    for axes in panels[len(matrices) :]:
        axes.set_axis_off()
    if not matrices:
        panels[0].set_title("no matrix was compared")
    for axes in panels[::columns]:
        axes.set_ylabel("singular value")
    legend_below(figure, panels, 3)
    return figure


def _ranked(spectrum: Tensor) -> tuple[range, list[float]]:
    values = spectrum.double().tolist()
    return range(1, len(values) + 1), values


def choose_matrices(matrices: Sequence[MatrixComparison], count: int = 3) -> list[MatrixComparison]:
    """Choose the matrices that lie farthest out, as in Figure 3 of SCORE (arXiv 2603.05768).

    By the mean subspace alignment of two experts, and the share of their energy off the diagonal in SCORE's basis, both
    taken as ranks: the first one has much alignment and little off the diagonal, the second one much of both, the third
    one little alignment and much off the diagonal; further ones fill up in the order of the model.

    Args:
        matrices: The records of the matrices.
        count: The number of matrices to choose; fewer if no more have a map.
    """
    mapped = [matrix for matrix in matrices if matrix.resolved is not None]
    alignment, off_diagonal = (
        _ranks([mean_of_pairs(m.alignment) for m in mapped]),
        _ranks([m.off_diagonal or 0 for m in mapped]),
    )
    chosen: list[int] = []
    for signs in ((1, -1), (1, 1), (-1, 1)):
        left = [i for i in range(len(mapped)) if i not in chosen]
        if left:
            chosen.append(max(left, key=lambda i: signs[0] * alignment[i] + signs[1] * off_diagonal[i]))
    chosen += [i for i in range(len(mapped)) if i not in chosen]
    return [mapped[i] for i in chosen[:count]]


def _ranks(values: Sequence[float]) -> list[int]:
    """Rank values in ascending order, from 0; NaN comes first."""
    order = sorted(range(len(values)), key=lambda i: -math.inf if math.isnan(values[i]) else values[i])
    return [order.index(i) for i in range(len(values))]


@drawn
def plot_score_maps(matrices: Sequence[MatrixComparison]) -> Figure:
    """Draw what SCORE keeps of the experts in their common basis, ``|Σ_score|`` (Figure 3 of arXiv 2603.05768).

    The diagonal is what the experts have for themselves, a block each; what lies off it couples their subspaces, and
    empty places there are what was taken out as a conflict.

    Args:
        matrices: The matrices, a panel each; those without a map are left out. :func:`choose_matrices` finds telling
            ones.
    """
    maps = [(matrix, matrix.resolved) for matrix in matrices if matrix.resolved is not None]
    columns = max(1, min(len(maps), 3))
    rows = -(-max(len(maps), 1) // columns)
    figure = Figure(WIDTH if columns > 1 else 4.2, 0.3 + (8.2 / max(columns, 2)) * rows)
    panels = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axes, (matrix, resolved) in zip(panels, maps, strict=False):
        values = resolved.detach().double().abs().cpu()
        pixels = values if len(values) <= _PIXELS else adaptive_max_pool2d(values[None], _PIXELS)[0]
        largest = float(values.max()) or 1.0
        scale = LogNorm(largest * 10.0**-_DECADES, largest, clip=True)
        size = len(values)
        image = axes.imshow(
            pixels.numpy(), norm=scale, cmap="magma", interpolation="none", extent=(0.5, size + 0.5, size + 0.5, 0.5)
        )
        axes.set_title(_title(matrix) + _shares(matrix))
        bare(axes)
        whole(axes.xaxis)
        whole(axes.yaxis)
        bar = figure.colorbar(image, ax=axes, location="bottom", aspect=18, shrink=0.9, extend="min", label="|entry|")
        plain_log(bar.ax.xaxis)
    for axes in panels[len(maps) :]:
        axes.set_axis_off()
    if not maps:
        panels[0].set_title("no matrix has a map: that takes two experts")
    return figure


def _title(matrix: MatrixComparison) -> str:
    """Break the name into lines that fit above a panel."""
    name = shown(matrix.name, 52)
    half = name.find(".", len(name) // 2 - 4)
    return name if len(name) <= 28 or half < 0 else f"{name[:half]}\n{name[half:]}"


def _shares(matrix: MatrixComparison) -> str:
    parts = {"alignment": mean_of_pairs(matrix.alignment), "off diagonal": matrix.off_diagonal}
    return "\n" + ", ".join(f"{name} {value:.2f}" for name, value in parts.items() if value is not None)
