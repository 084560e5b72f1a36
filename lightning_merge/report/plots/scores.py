"""Figures of scores: by domain, by coefficient, by number of tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lightning_merge.evaluation.benchmark.foundations_table import FoundationsTable
from lightning_merge.evaluation.held_out import BASE, OWN_EXPERT, is_method
from lightning_merge.evaluation.table import Table
from lightning_merge.report.plots.cells import draw_cells, name_cells, scale_of
from lightning_merge.report.style import (
    INK,
    MUTED,
    SEQUENTIAL,
    WIDTH,
    Figure,
    colors,
    drawn,
    legend_below,
    looks,
    shown,
)
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.grid import places


@drawn
def plot_heat_map(table: Table) -> Figure:
    """Draw the metric of every row on every domain in percent, and its mean; the best method of a column is framed.

    Args:
        table: The table. What was not measured, or is no number, is a hatched cell.
    """
    rows, domains = table.row_names, table.domains
    values = 100 * np.array([[_number(table.value(row, domain)) for domain in domains] for row in rows])
    parts = [(values, domains)]
    if len(domains) > 1:
        parts.append((100 * np.array([[_number(table.mean(row))] for row in rows]), ["mean"]))
    names = [shown(row) for row in rows]
    around = 1.2 + 0.064 * max(map(len, names), default=0)  # what the names and the colour bar take, in inches
    columns = sum(len(heads) for _, heads in parts)
    figure = Figure(max(WIDTH, around + 0.62 * columns), 1.2 + 0.26 * len(rows))
    room = (figure.get_figwidth() - around) / columns
    widths = [len(heads) for _, heads in parts]
    panels = figure.subplots(1, len(parts), squeeze=False, sharey=True, width_ratios=widths)[0]
    scale = scale_of(values)
    for axes, (part, heads) in zip(panels, parts, strict=True):
        mesh = draw_cells(axes, part, scale, SEQUENTIAL, 1, _best_methods(part, rows, table.lower_is_better))
        name_cells(axes, names, [shown(head, 24) for head in heads], room)
    for label, row in zip(panels[0].get_yticklabels(), rows, strict=True):
        label.set_fontstyle("normal" if is_method(row) else "italic")
    figure.colorbar(mesh, ax=panels, label=f"{_metric(table)} in %", shrink=min(1.0, 4 / len(rows)), aspect=15)
    return figure


def _best_methods(values: np.ndarray, rows: Sequence[str], lowest: bool) -> np.ndarray:
    """Mark the best of several methods in each column ``(rows, columns)``."""
    methods = np.array([is_method(row) for row in rows])
    best = np.zeros(values.shape, dtype=bool)
    if methods.sum() > 1:
        columns = [places(column, lower_is_better=lowest) for column in values[methods].T.tolist()]
        best[methods] = np.array([[place == 1 for place in column] for column in columns]).T
    return best


def best_rows(table: Table, count: int = 4) -> list[str]:
    """Choose the base, the weight average, and the methods with the best means, in the order of the table.

    Args:
        table: The table.
        count: The number of methods besides the weight average.
    """
    sign = -1 if table.lower_is_better else 1
    means = {row: _number(table.mean(row)) for row in table.row_names if is_method(row)}
    order = sorted((row for row in means if math.isfinite(means[row])), key=lambda row: -sign * means[row])
    average = [r["row"] for r in table.records if (r.get("method") or {}).get("class_path") == "WeightAverage"][:1]
    others = [row for row in order or list(means) if row not in average]
    chosen = {BASE, *average, *others[:count]}
    return [row for row in table.row_names if row in chosen]


@drawn
def plot_domains(table: Table, rows: Sequence[str] | None = None) -> Figure:
    """Draw bars for a few rows on every domain: the metric in percent of that of the domain's own expert.

    Where no own expert was measured, or the metric is an error, the bars are the metric itself. A cross stands where
    there is no number.

    Args:
        table: The table.
        rows: The rows to show; by default :func:`best_rows`.
    """
    rows = best_rows(table) if rows is None else list(rows)
    is_normalized = OWN_EXPERT in table.row_names and not table.lower_is_better
    values = 100 * np.array([[_share(table, row, domain, is_normalized) for domain in table.domains] for row in rows])
    names = [shown(domain, 24) for domain in table.domains]
    values = values.reshape(len(rows), len(names))
    if len(names) > 1:
        values, names = np.hstack([values, values.mean(axis=1, keepdims=True)]), [*names, "mean"]
    tilt = _tilt(names)
    figure = Figure(max(WIDTH, 0.9 * len(names) + 1), 4.2 if tilt else 3.4)
    axes = figure.subplots()
    width = min(0.84 / max(len(rows), 1), 0.3)
    free = iter(colors(sum(row != BASE for row in rows)))
    for i, (row, heights) in enumerate(zip(rows, values, strict=True)):
        places = np.arange(len(names)) + (i - (len(rows) - 1) / 2) * width
        color = MUTED if row == BASE else next(free)
        axes.bar(places, heights, 0.92 * width, label=shown(row), color=color)
        for place in places[~np.isfinite(heights)]:
            axes.annotate("×", (place, 0), (0, 1), textcoords="offset points", ha="center", color=color)
    axes.set_xlim(-0.6, len(names) - 0.4)
    if not np.isfinite(values).any():
        axes.set_ylim(0, 100)
    if is_normalized:
        axes.axhline(100, color=INK, linewidth=1, linestyle="--")
        axes.annotate("own expert", (1, 100), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", fontsize=7.5)  # fmt: skip
    axes.set_xticks(range(len(names)), names, **tilt)
    axes.set_ylabel(_share_label(table) if is_normalized else f"{_metric(table)} in %")
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)
    legend_below(figure, [axes], 3)
    return figure


@drawn
def plot_sweep(table: Table) -> Figure:
    """Draw the normalized accuracy by the coefficient, a line for each setting of the other fields; the best is marked.

    With one setting of the others, every domain has a thin line, too.

    Args:
        table: What ``lightning-merge search`` evaluated: records with ``setting``.

    Raises:
        MergeError: If there is no such record.
    """
    settings = {r["row"]: r["setting"] for r in table.records if r.get("setting") is not None}
    if not settings:
        raise MergeError("There is no sweep to draw: no record has a setting; give the records of a search.")
    field = _swept_field(list(settings.values()))
    values = list(dict.fromkeys(setting[field] for setting in settings.values()))
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    place = {value: value if is_number else i for i, value in enumerate(values)}
    lines: dict[str, dict[Any, float]] = {}
    for row, setting in settings.items():
        others = ", ".join(f"{name} {value}" for name, value in setting.items() if name != field)
        shares = [_share(table, row, domain, True) for domain in table.domains]
        lines.setdefault(others, {})[row] = 100 * sum(shares) / len(shares)
    figure = Figure(WIDTH, 3.4)
    axes = figure.subplots()
    if len(lines) == 1:
        for domain, color in zip(table.domains, colors(len(table.domains) + 1)[1:], strict=True):
            xs = [place[setting[field]] for setting in settings.values()]
            ys = [100 * _share(table, row, domain, True) for row in settings]
            axes.plot(xs, ys, color=color, linewidth=0.9, label=shown(domain))
    for (others, means), look in zip(lines.items(), looks(len(lines)), strict=True):
        xs = [place[settings[row][field]] for row in means]
        name = shown(others) or "mean"
        axes.plot(xs, list(means.values()), marker="o", linewidth=2, label=name, **look)
    _mark_best(axes, lines, {row: place[setting[field]] for row, setting in settings.items()})
    if not is_number:
        axes.set_xticks(range(len(values)), [shown(value, 24) for value in values])
    axes.set(xlabel=field, ylabel=_share_label(table))
    legend_below(figure, [axes])
    return figure


def _swept_field(settings: Sequence[Mapping[str, Any]]) -> str:
    """Find the last field that has several values; ``scale`` stands last."""
    names = list(settings[0])
    return next((n for n in reversed(names) if len({str(setting[n]) for setting in settings}) > 1), names[-1])


def _mark_best(axes: Axes, lines: Mapping[str, Mapping[str, float]], places: Mapping[str, float]) -> None:
    means = {row: mean for line in lines.values() for row, mean in line.items() if math.isfinite(mean)}
    if not means:
        return
    best = max(means, key=means.__getitem__)
    axes.plot(places[best], means[best], "o", markersize=11, fillstyle="none", color=INK, markeredgewidth=1.4)
    axes.annotate(f"{shown(best)}: {means[best]:.1f}", (places[best], means[best]), (0, 9), ha="center",
                  textcoords="offset points", fontsize=8, fontweight="bold")  # fmt: skip
    axes.margins(y=0.12)


@drawn
def plot_tasks(table: FoundationsTable, method: str) -> Figure:
    """Draw the normalized accuracy by the number of merged tasks, a line for each way to merge.

    This is Figure 5 of arXiv 2410.12766. The first part of a way's name has its own line style, and what follows a
    ``+`` its own colour.

    Args:
        table: The table.
        method: The merging method.
    """
    counts, arms = table.names("merged"), table.names("arm")
    starts, ends = (list(dict.fromkeys(arm.partition(" + ")[i] for arm in arms)) for i in (0, 2))
    styles = dict(zip(starts, [":", "--", "-", "-."] * len(starts), strict=False))
    hues = dict(zip(ends, [INK, *colors(max(len(ends) - 1, 1))], strict=False))
    figure = Figure(WIDTH, 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, part in zip(panels, ("average", "worst"), strict=True):
        for arm in arms:
            start, _, end = arm.partition(" + ")
            means = [100 * statistics.fmean(getattr(table.cell(n, arm, method), part) or [math.nan]) for n in counts]
            axes.plot(counts, means, marker="o", label=shown(arm), linestyle=styles[start], color=hues[end])
        title = "worst task" if part == "worst" else "average over the tasks"
        axes.set(xlabel="tasks", title=title, xticks=counts, ylim=(0, 102))
    panels[0].set_ylabel("accuracy in % of the experts'")
    legend_below(figure, panels, 3)
    return figure


def _number(value: float | None) -> float:
    """Read a number; NaN where there is none."""
    return math.nan if value is None else float(value)


def _share(table: Table, row: str, domain: str, is_normalized: bool) -> float:
    """Read the value, and divide it by that of the domain's own expert if it is normalized."""
    value = _number(table.value(row, domain))
    if not is_normalized:
        return value
    expert = _number(table.value(OWN_EXPERT, domain))
    return value / expert if expert else math.nan


def _metric(table: Table) -> str:
    return table.metric.replace("_", " ")


def _share_label(table: Table) -> str:
    return f"{_metric(table)} in % of the expert's"


def _tilt(names: Sequence[str]) -> dict[str, Any]:
    """Choose how names stand below an axis: tilted where they would run into each other."""
    is_long = max(map(len, names), default=0) * len(names) > 95
    return {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_long else {}
