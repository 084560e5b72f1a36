"""Write reports: the page, the tables and the numbers behind them."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_merge import __version__
from lightning_merge.analysis.compare_experts import compare_experts
from lightning_merge.analysis.comparison import Comparison
from lightning_merge.analysis.comparison_files import read_comparison, save_comparison
from lightning_merge.checkpoints import check_parent, write_text
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.evaluation.benchmark.foundations_table import FoundationsTable
from lightning_merge.evaluation.table import Table
from lightning_merge.merging.merged import Merged
from lightning_merge.merging.recipe import obstacles, recipe_text
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.report.html import write_page
from lightning_merge.report.page import Page
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.tensors import is_finite, without_masks

REPORT = "report.html"


def check_report(path: str | Path | None) -> None:
    """Raise a :class:`MergeError` if no report can be written to this file."""
    if path is None:
        return
    path = local_path(path)
    if path.suffix not in (".html", ".htm") or path.is_dir():
        raise MergeError(f"The report is an HTML file, and {path} is not the name of one; end it in .html.")
    check_parent(path)


def report_analysis(comparison: Comparison, folder: str | Path, configuration: str = "") -> Page:
    """Write ``report.html``, ``table.md``, ``table.csv``, ``table.tex`` and ``comparison.json`` into a folder."""
    from lightning_merge.report.analysis_report import analysis_page
    from lightning_merge.report.experts import experts_grid

    folder, grid = local_path(folder), experts_grid(comparison)
    write_text(folder / "table.md", grid.markdown() + "\n")
    write_text(folder / "table.csv", grid.csv())
    write_text(folder / "table.tex", grid.latex() + "\n")
    save_comparison(comparison, folder)
    page = analysis_page(comparison, configuration, list(_facts(comparison)))
    write_page(page, folder / REPORT, data={"comparison": comparison.to_dict()})
    return page


def report_merge(
    merged: Merged,
    path: str | Path,
    table: Table | None = None,
    configuration: str = "",
    workers: int | None = None,
) -> Page:
    """Compare the experts with each other and with the merged model, and write the page about it into a file."""
    from lightning_merge.report.merge_report import merge_page

    shared, manifest = merged.inventory.merged, merged.manifest
    is_whole = all(is_finite(without_masks(merged.weights[name], merged.base[name])[0]) for name in shared)
    comparison = compare_experts(
        merged.base,
        merged.experts,
        {manifest["method"]["class_path"]: merged.weights} if is_whole else None,
        include=[glob.escape(name) for name in shared],
        matrices=Matrices(**manifest["matrices"]),
        workers=workers,
    )
    if not configuration and not obstacles(merged.manifest):
        configuration = recipe_text(merged.manifest, "merged.safetensors")
    page = merge_page(merged, comparison, table, configuration, list(_facts(comparison)))
    records = list(table.records) if table else []
    data = {"manifest": merged.manifest, "records": records, "comparison": comparison.to_dict()}
    write_page(page, path, data=data)
    return page


def report_benchmark(
    table: Table | FoundationsTable,
    folder: Path,
    updates: Mapping[str, Any] | None = None,
    configuration: str = "",
) -> Page:
    """Write ``report.html`` into the folder of a benchmark, from what was measured there."""
    from lightning_merge.report.benchmark_report import benchmark_page, foundations_page

    data: dict[str, Any] = {"records": list(table.records)}
    if isinstance(table, FoundationsTable):
        page = foundations_page(table, configuration, list(_facts()))
    else:
        comparison = read_comparison(folder)
        page = benchmark_page(table, comparison, updates, configuration, list(_facts(comparison)))
        data |= {"updates": updates or {}, "comparison": comparison.to_dict() if comparison else None}
    write_page(page, folder / REPORT, data=data)
    return page


def report_search(table: Table, folder: Path, chosen: str, method: str, configuration: str = "") -> Page:
    """Write ``report.html`` into the folder of a search, from what was measured there."""
    from lightning_merge.report.search_report import search_page

    page = search_page(table, chosen, method, configuration, list(_facts()))
    write_page(page, folder / REPORT, data={"records": list(table.records)})
    return page


def _facts(comparison: Comparison | None = None) -> Iterator[tuple[str, str]]:
    yield "Made", f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    yield "With", f"lightning_merge {__version__}"
    if comparison is not None:
        yield "Experts", ", ".join(comparison.experts)
        entries = sum(math.prod(parameter.shape) for parameter in comparison.parameters)
        yield "Parameters", f"{len(comparison.parameters)}, {entries:,} entries"
