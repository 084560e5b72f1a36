"""Tables and figures for Lightning's loggers: methods stand side by side in TensorBoard's HParams tab."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_merge.evaluation.benchmark.foundations_table import FoundationsTable
from lightning_merge.evaluation.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS = "rows"
_LONGEST = 80  # characters of a tag; a row's is the name of a folder, too


@dataclass(frozen=True)
class _Row:
    """A row of a table, for a logger.

    Args:
        name: The name of the row.
        arguments: The arguments of its method, as hyper-parameters.
        metrics: The measured numbers by their tags.
    """

    name: str
    arguments: Mapping[str, Any]
    metrics: Mapping[str, float]


def log_to_loggers(
    loggers: Iterable[Logger], table: Table | FoundationsTable | None, figures: Mapping[str, Figure]
) -> None:
    """Write the results of an evaluation to loggers, in the first process alone.

    TensorBoard gets a run below its own for each row of the table, ``rows/ROW``, with the arguments of the method as
    hyper-parameters and every number of the row as a metric, so that its HParams tab compares them, and the figures.
    Other loggers get the metrics as ``ROW/METRIC``, and the figures if they take images (``log_image``, as of Weights &
    Biases). Characters of names that TensorBoard does not know are ``_`` in its tags.

    Args:
        loggers: The loggers that the user asked for.
        table: The table, if there is one.
        figures: Figures by their titles; they stay open.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]  # Lightning sets it on the function when it is imported
        return
    rows = []
    if table is not None:
        rows = _rows_of_foundations(table) if isinstance(table, FoundationsTable) else _rows(table)
    names = safe_names(row.name for row in rows)
    tags = safe_names(figures)
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            for row in rows:
                _log_run(f"{logger.log_dir}", names[row.name], row)
            for title, figure in figures.items():
                logger.experiment.add_figure(tags[title], figure, global_step=0, close=False)
            logger.experiment.flush()
        else:
            metrics = {f"{names[row.name]}/{tag}": value for row in rows for tag, value in row.metrics.items()}
            if metrics:
                logger.log_metrics(metrics, step=0)
            if hasattr(logger, "log_image"):
                for title, figure in figures.items():
                    logger.log_image(key=tags[title], images=[figure])
            logger.save()


def safe_names(names: Iterable[str]) -> dict[str, str]:
    """Make a tag for each name that can name a folder, too; no two are the same, even if case is ignored.

    Args:
        names: The names, of any characters.

    Returns:
        The tags by name.
    """
    tags: dict[str, str] = {}
    taken: set[str] = set()
    for name in dict.fromkeys(names):
        plain = re.sub(r"[^\w.-]+", "_", name)[:_LONGEST].strip("._") or "unnamed"
        tag, i = plain, 1
        while tag.lower() in taken:
            i += 1
            tag = f"{plain}-{i}"
        taken.add(tag.lower())
        tags[name] = tag
    return tags


def _log_run(folder: str, name: str, row: _Row) -> None:
    """Write one row as a run of its own."""
    run = TensorBoardLogger(folder, name=_ROWS, version=name, default_hp_metric=False)
    run.log_hyperparams(dict(row.arguments), dict(row.metrics))
    run.finalize("success")


def _rows(table: Table) -> list[_Row]:
    """Collect the rows of a table, with the numbers of the metric that it shows."""
    domains = safe_names(table.domains)
    tags = [f"{table.metric}/{column}" for column in table.header[len(domains) + 1 :]]
    tags = [*(f"{table.metric}_by_domain/{tag}" for tag in domains.values()), *tags]
    described: dict[str, Any] = {}
    for record in table.records:
        described.setdefault(record["row"], record.get("method"))
    return [
        _Row(
            row,
            {"row": row, **_arguments(described[row])},
            {tag: value for tag, value in zip(tags, table.line(row), strict=True) if value is not None},
        )
        for row in table.row_names
    ]


def _rows_of_foundations(table: FoundationsTable) -> list[_Row]:
    """Average each way to merge by each method, for each number of tasks, over the seeds."""
    tasks = safe_names(table.names("task"))
    keys = ("merged", "arm", "method")
    measured: dict[tuple, list[dict[str, Any]]] = {}
    for record in table.records:
        measured.setdefault(tuple(record[key] for key in keys), []).append(record)
    rows = []
    for (merged, arm, method), records in measured.items():
        cell = table.cell(merged, arm, method)
        metrics = {"normalized/mean": statistics.mean(cell.average), "normalized/worst": statistics.mean(cell.worst)}
        for task in dict.fromkeys(record["task"] for record in records):
            values = [record["accuracy"] for record in records if record["task"] == task]
            metrics[f"accuracy_by_task/{tasks[task]}"] = statistics.mean(values)
        name = f"{merged} tasks, {arm}, {method}"
        rows.append(_Row(name, {"row": name, "tasks": merged, "arm": arm, "class": method}, metrics))
    return rows


def _arguments(method: Mapping[str, Any] | None, prefix: str = "") -> dict[str, Any]:
    """Flatten the description of a method: ``class``, its fields, and ``method.density`` of the one inside."""
    if method is None:
        return {}
    arguments = {prefix.removesuffix(".") or "class": method["class_path"]}
    for name, value in method["init_args"].items():
        if isinstance(value, Mapping) and "class_path" in value:
            arguments |= _arguments(value, f"{prefix}{name}.")
        else:
            arguments[f"{prefix}{name}"] = value
    return arguments
