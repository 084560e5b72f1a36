"""The tables of a benchmark over several foundations: ways to merge down, merging methods across."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_merge.analysis.normalized import normalized_accuracy
from lightning_merge.checkpoints import write_text
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.utilities.grid import Cell, Grid, as_csv, places


@dataclass(frozen=True)
class Reached:
    """Normalized accuracies that one way to merge and one method reach, over the seeds.

    Args:
        average: For each seed the accuracy divided by that of the task's expert, averaged over the tasks.
        worst: For each seed that of the worst task.
    """

    average: Sequence[float]
    worst: Sequence[float]

    @property
    def mean(self) -> float:
        """The mean of the average over the seeds."""
        return statistics.mean(self.average)

    def __str__(self) -> str:
        spread = ""
        if len(self.average) > 1 and math.isfinite(self.mean):
            spread = f" ± {100 * statistics.stdev(self.average):.1f}"
        return f"{100 * self.mean:.1f}{spread} ({100 * statistics.mean(self.worst):.1f})"


@dataclass(frozen=True)
class FoundationsTable:
    """Tables of normalized accuracies, from the records of a benchmark.

    Args:
        records: The measurements, each with ``seed``, ``merged`` (the number of tasks), ``arm``, ``method``, ``task``,
            ``accuracy`` and ``expert``, the accuracy of the task's own expert.
    """

    records: Sequence[dict[str, Any]]

    def names(self, key: str) -> list[Any]:
        """List the values of a key, in the order of the records."""
        return list(dict.fromkeys(record[key] for record in self.records))

    def cell(self, merged: int, arm: str, method: str) -> Reached:
        """Normalize the accuracies of one way and method when so many tasks are merged."""
        wanted = [r for r in self.records if (r["merged"], r["arm"], r["method"]) == (merged, arm, method)]
        average, worst = [], []
        for seed in dict.fromkeys(record["seed"] for record in wanted):
            by_task = {r["task"]: r for r in wanted if r["seed"] == seed}
            if any(math.isnan(r["expert"]) for r in by_task.values()):  # nothing to divide by
                average.append(math.nan)
                worst.append(math.nan)
                continue
            normalized = normalized_accuracy(
                {task: r["accuracy"] for task, r in by_task.items()}, {task: r["expert"] for task, r in by_task.items()}
            )
            average.append(normalized.average)
            worst.append(normalized.worst)
        return Reached(average, worst)

    def grids(self) -> list[Grid]:
        """Lay out a table for each number of tasks; the best and the second best way of every method have a place."""
        methods, arms = self.names("method"), self.names("arm")
        grids = []
        for merged in self.names("merged"):
            columns = []
            for method in methods:
                reached = [self.cell(merged, arm, method) for arm in arms]
                means = [each.mean for each in reached]
                columns.append([Cell(str(r), m, p) for r, m, p in zip(reached, means, places(means), strict=True)])
            rows = [[Cell(arm), *cells] for arm, *cells in zip(arms, *columns, strict=True)]
            grids.append(Grid([f"{merged} tasks", *methods], rows, self.caption))
        return grids

    def markdown(self) -> str:
        """Format a table for each number of tasks and one caption as Markdown; the best way of every method is bold."""
        return "\n\n".join([*("\n".join(grid.markdown_lines()) for grid in self.grids()), self.caption])

    @property
    def caption(self) -> str:
        """A line that says what the numbers are."""
        seeds = len(self.names("seed"))
        over = f" Mean ± standard deviation over {seeds} seeds." if seeds > 1 else ""
        return (
            "Accuracy in % of that of each task's own expert, averaged over the tasks; in brackets that of the worst "
            f"task.{over}"
        )

    def csv(self) -> str:
        """Format every measurement as CSV, with unrounded numbers."""
        columns = list(self.records[0])
        return as_csv([columns, *([record.get(column) for column in columns] for record in self.records)])

    def save(self, folder: str | Path) -> None:
        """Write ``results.jsonl``, ``table.md``, ``table.tex`` and ``table.csv`` (every measurement) to a folder."""
        folder = local_path(folder)
        write_text(folder / "results.jsonl", "".join(json.dumps(record) + "\n" for record in self.records))
        write_text(folder / "table.md", self.markdown() + "\n")
        write_text(folder / "table.tex", "\n\n".join(grid.latex() for grid in self.grids()) + "\n")
        write_text(folder / "table.csv", self.csv())

    def __str__(self) -> str:
        return self.markdown()
