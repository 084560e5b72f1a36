"""The tables of a benchmark over several foundations: ways to merge down, merging methods across."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_merge.analysis.normalized import normalized_accuracy
from lightning_merge.checkpoints import write_text
from lightning_merge.evaluation.markdown import markdown_table


@dataclass(frozen=True)
class Cell:
    """What one way to merge and one method reach, over the seeds.

    Args:
        average: For each seed the accuracy divided by that of the task's expert, averaged over the tasks.
        worst: For each seed that of the worst task.
    """

    average: Sequence[float]
    worst: Sequence[float]

    def __str__(self) -> str:
        spread = f" ± {100 * statistics.stdev(self.average):.1f}" if len(self.average) > 1 else ""
        return f"{100 * statistics.mean(self.average):.1f}{spread} ({100 * statistics.mean(self.worst):.1f})"


@dataclass(frozen=True)
class FoundationsTable:
    """Normalized accuracies from the records of a benchmark.

    Args:
        records: Each with ``seed``, ``merged`` (how many tasks), ``arm``, ``method``, ``task``, ``accuracy`` and
            ``expert``, the accuracy of the task's own expert.
    """

    records: Sequence[dict[str, Any]]

    def names(self, key: str) -> list[Any]:
        """The values of a key, in the order of the records."""
        return list(dict.fromkeys(record[key] for record in self.records))

    def cell(self, merged: int, arm: str, method: str) -> Cell:
        """The numbers of one way and method when so many tasks are merged."""
        wanted = [r for r in self.records if (r["merged"], r["arm"], r["method"]) == (merged, arm, method)]
        average, worst = [], []
        for seed in dict.fromkeys(record["seed"] for record in wanted):
            own = {r["task"]: r for r in wanted if r["seed"] == seed}
            found = normalized_accuracy(
                {task: r["accuracy"] for task, r in own.items()}, {task: r["expert"] for task, r in own.items()}
            )
            average.append(found.average)
            worst.append(found.worst)
        return Cell(average, worst)

    def markdown(self) -> str:
        """A table for each number of tasks; the best way of every method is bold."""
        parts = []
        for merged in self.names("merged"):
            methods, arms = self.names("method"), self.names("arm")
            cells = {(arm, method): self.cell(merged, arm, method) for arm in arms for method in methods}
            best = {method: max(statistics.mean(cells[arm, method].average) for arm in arms) for method in methods}

            def text(arm: str, method: str, cells: dict = cells, best: dict = best) -> str:
                cell = cells[arm, method]
                return f"**{cell}**" if statistics.mean(cell.average) == best[method] else str(cell)

            header = [f"{merged} tasks", *methods]
            parts.append(markdown_table(header, [[arm, *(text(arm, method) for method in methods)] for arm in arms]))
        return "\n\n".join([*parts, self.caption])

    @property
    def caption(self) -> str:
        """What the numbers are, in a line."""
        seeds = len(self.names("seed"))
        over = f" Mean ± standard deviation over {seeds} seeds." if seeds > 1 else ""
        return (
            "Accuracy in % of that of each task's own expert, averaged over the tasks; in brackets that of the worst "
            f"task.{over}"
        )

    def csv(self) -> str:
        """Every measurement as CSV, with unrounded numbers."""
        out = io.StringIO()
        writer = csv.DictWriter(out, list(self.records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records)
        return out.getvalue()

    def save(self, folder: str | Path) -> None:
        """Write ``results.jsonl``, ``table.md`` and ``table.csv`` into a folder."""
        folder = Path(folder)
        write_text(folder / "results.jsonl", "".join(json.dumps(record) + "\n" for record in self.records))
        write_text(folder / "table.md", self.markdown() + "\n")
        write_text(folder / "table.csv", self.csv())

    def __str__(self) -> str:
        return self.markdown()
