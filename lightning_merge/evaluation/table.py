"""The table of a benchmark: methods down, held-out domains across."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_merge.analysis.normalized import normalized_accuracy
from lightning_merge.checkpoints import write_text
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.evaluation.held_out import BASE, ENSEMBLE, OWN_EXPERT, is_method
from lightning_merge.models.metrics import METRICS
from lightning_merge.utilities.grid import Cell, Grid, Place, places

_LOWER_IS_BETTER = ("calibration_error",)


@dataclass(frozen=True)
class Table:
    """Table of one metric, for every row on every domain, from the records of an evaluation.

    Args:
        records: The measurements, each with ``row``, ``domain`` and the metric.
        metric: The metric to show.
    """

    records: Sequence[dict[str, Any]]
    metric: str = "accuracy"

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric is an error."""
        return self.metric in _LOWER_IS_BETTER

    @property
    def domains(self) -> list[str]:
        """The domains, in the order of the records."""
        return list(dict.fromkeys(record["domain"] for record in self.records))

    @property
    def row_names(self) -> list[str]:
        """The rows: the base, the methods, the ensemble, the own expert. Single other experts are left out."""
        names = list(dict.fromkeys(record["row"] for record in self.records))
        methods = [row for row in names if is_method(row)]
        return [row for row in (BASE, *methods, ENSEMBLE, OWN_EXPERT) if row in names]

    def value(self, row: str, domain: str) -> float | None:
        """Look up the metric of a row on a domain; None if it was not measured."""
        for record in self.records:
            if record["row"] == row and record["domain"] == domain:
                return record[self.metric]
        return None

    def values(self, row: str) -> list[float]:
        """List the metric of a row on every domain where it was measured."""
        return list(self._by_domain(row).values())

    def _by_domain(self, row: str) -> dict[str, float]:
        return {domain: value for domain in self.domains if (value := self.value(row, domain)) is not None}

    def mean(self, row: str) -> float | None:
        """Compute the mean over the domains; None unless the row was measured on all of them, NaN if one of them is."""
        values = self.values(row)
        return sum(values) / len(values) if len(values) == len(self.domains) else None

    def worst(self, row: str) -> float | None:
        """Find the value on the worst domain; None unless the row was measured on all of them, NaN if one is."""
        values = self.values(row)
        if len(values) < len(self.domains):
            return None
        sign = 1 if self.lower_is_better else -1
        return max(values, key=lambda value: (math.isnan(value), sign * value))

    def normalized(self, row: str) -> float | None:
        """Divide the values by those of the domains' own experts and average them; NaN if one of them is.

        Returns:
            The mean; None unless both were measured on all domains, or if the value of an own expert is 0.
        """
        accuracies, experts = self._by_domain(row), self._by_domain(OWN_EXPERT)
        if not len(accuracies) == len(experts) == len(self.domains) or not all(experts.values()):
            return None
        if any(map(math.isnan, experts.values())):
            return math.nan
        return normalized_accuracy(accuracies, experts).average

    @property
    def header(self) -> list[str]:
        """The names of the columns."""
        return ["method", *self.domains, "mean", "worst", *(["normalized"] if self._is_normalized else [])]

    @property
    def _is_normalized(self) -> bool:
        """Whether there is a sensible ratio to the own expert, and an own expert to divide by."""
        return not self.lower_is_better and self.mean(OWN_EXPERT) is not None

    def line(self, row: str) -> list[float | None]:
        """List the numbers of a row, in the order of the header, as fractions (not in percent)."""
        values = [*(self.value(row, domain) for domain in self.domains), self.mean(row), self.worst(row)]
        return [*values, self.normalized(row)] if self._is_normalized else values

    def grid(self) -> Grid:
        """Lay out the table as shown, in percent; the best and the second best method of every column have a place."""
        lines = {row: self.line(row) for row in self.row_names}
        methods = [row for row in lines if is_method(row)]
        marked: dict[tuple[str, int], Place | None] = {}
        for i in range(len(self.header) - 1) if len(methods) > 1 else ():
            ranks = places([lines[row][i] for row in methods], lower_is_better=self.lower_is_better)
            marked |= {(row, i): place for row, place in zip(methods, ranks, strict=True)}
        rows = [
            [Cell(row), *(Cell(_percent(value), value, marked.get((row, i))) for i, value in enumerate(values))]
            for row, values in lines.items()
        ]
        return Grid(self.header, rows, self.caption)

    def grids(self) -> list[Grid]:
        """Lay out a table for every metric."""
        return [replace(self, metric=metric).grid() for metric in METRICS]

    def markdown(self) -> str:
        """Format the table as Markdown, in percent; the best method of every column is bold."""
        return self.grid().markdown()

    @property
    def caption(self) -> str:
        """A line that says what the numbers are."""
        text = f"{self.metric.replace('_', ' ').capitalize()} in % on each domain"
        tested_on = {record.get("test_on") for record in self.records}
        if "all" in tested_on:
            text += " (all of it; its own expert: on its test split)"
        elif "val" in tested_on:
            text += " (its validation split)"
        if self._is_normalized:
            text += "; normalized: divided by that of the domain's own expert, then averaged over the domains"
        return text + "."

    def csv(self) -> str:
        """Format the table as CSV, with unrounded numbers."""
        return self.grid().csv()

    def save(self, folder: str | Path) -> None:
        """Write ``results.jsonl``, ``table.md``, ``table.tex`` (every metric) and ``table.csv`` (this one) there."""
        folder = local_path(folder)
        every = self.grids()
        write_text(folder / "results.jsonl", "".join(json.dumps(record) + "\n" for record in self.records))
        write_text(folder / "table.md", "\n\n".join(grid.markdown() for grid in every) + "\n")
        write_text(folder / "table.tex", "\n\n".join(grid.latex() for grid in every) + "\n")
        write_text(folder / "table.csv", self.csv())

    def __str__(self) -> str:
        return self.markdown()


def _percent(value: float | None) -> str:
    """Format a share in percent; nothing where it was not measured, and ``nan`` where no number came out."""
    return "" if value is None else f"{100 * value:.1f}"
