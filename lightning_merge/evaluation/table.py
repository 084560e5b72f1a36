"""The table of a benchmark: methods down, held-out domains across."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_merge.analysis.normalized import normalized_accuracy
from lightning_merge.checkpoints import write_text
from lightning_merge.evaluation.held_out import BASE, ENSEMBLE, OWN_EXPERT, is_method
from lightning_merge.evaluation.markdown import markdown_table
from lightning_merge.models.metrics import METRICS

_LOWER_IS_BETTER = ("calibration_error",)


@dataclass(frozen=True)
class Table:
    """One metric for every row on every domain, from the records of an evaluation.

    Args:
        records: Each with ``row``, ``domain`` and the metric.
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
        found = list(dict.fromkeys(record["row"] for record in self.records))
        methods = [row for row in found if is_method(row)]
        return [row for row in (BASE, *methods, ENSEMBLE, OWN_EXPERT) if row in found]

    def value(self, row: str, domain: str) -> float | None:
        """The metric of a row on a domain; None if it was not measured."""
        for record in self.records:
            if record["row"] == row and record["domain"] == domain:
                return record[self.metric]
        return None

    def values(self, row: str) -> list[float]:
        """The metric of a row on every domain where it was measured."""
        return [value for domain in self.domains if (value := self.value(row, domain)) is not None]

    def mean(self, row: str) -> float | None:
        """The mean over the domains; None unless the row was measured on all of them."""
        values = self.values(row)
        return sum(values) / len(values) if len(values) == len(self.domains) else None

    def worst(self, row: str) -> float | None:
        """The value on the worst domain; None unless the row was measured on all of them."""
        values = self.values(row)
        if len(values) < len(self.domains):
            return None
        return max(values) if self.lower_is_better else min(values)

    def normalized(self, row: str) -> float | None:
        """The mean over the domains of the value divided by that of the domain's own expert."""
        accuracies = {domain: self.value(row, domain) for domain in self.domains}
        experts = {domain: self.value(OWN_EXPERT, domain) for domain in self.domains}
        if None in accuracies.values() or not all(experts.values()):
            return None
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
        """The numbers of a row, in the order of the header, in [0, 1]."""
        values = [*(self.value(row, domain) for domain in self.domains), self.mean(row), self.worst(row)]
        return [*values, self.normalized(row)] if self._is_normalized else values

    def markdown(self) -> str:
        """The table in Markdown, in percent; the best method of every column is bold."""
        lines = {row: self.line(row) for row in self.row_names}
        methods = [row for row in lines if is_method(row)]
        choose = min if self.lower_is_better else max
        best = [
            choose((lines[row][i] for row in methods if lines[row][i] is not None), default=None)
            for i in range(len(self.header) - 1)
        ]

        def cell(row: str, i: int) -> str:
            value = lines[row][i]
            if value is None:
                return ""
            text = f"{100 * value:.1f}"
            return f"**{text}**" if row in methods and len(methods) > 1 and value == best[i] else text

        body = [[row, *(cell(row, i) for i in range(len(best)))] for row in lines]
        return f"{markdown_table(self.header, body)}\n\n{self.caption}"

    @property
    def caption(self) -> str:
        """What the numbers are, in a line."""
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
        """The table as CSV, with unrounded numbers."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows([row, *("" if v is None else v for v in self.line(row))] for row in self.row_names)
        return out.getvalue()

    def save(self, folder: str | Path) -> None:
        """Write ``results.jsonl``, ``table.md`` (every metric) and ``table.csv`` (this one) into a folder."""
        folder = Path(folder)
        every = [replace(self, metric=metric) for metric in METRICS]
        write_text(folder / "results.jsonl", "".join(json.dumps(record) + "\n" for record in self.records))
        write_text(folder / "table.md", "\n\n".join(table.markdown() for table in every) + "\n")
        write_text(folder / "table.csv", self.csv())

    def __str__(self) -> str:
        return self.markdown()
