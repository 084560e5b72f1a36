"""The report of a benchmark: which method, on which domain, by how much; and what the experts say about why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lightning_merge.analysis.comparison import Comparison
from lightning_merge.evaluation.benchmark.foundations_table import FoundationsTable
from lightning_merge.evaluation.held_out import BASE, OWN_EXPERT, is_method
from lightning_merge.evaluation.table import Table
from lightning_merge.report.experts import agreement, experts_in_words, layers, suspicions
from lightning_merge.report.page import Page, Picture, Section, again
from lightning_merge.report.plots import plot_domains, plot_heat_map, plot_tasks
from lightning_merge.report.words import count, listed, percent, points
from lightning_merge.utilities.grid import Cell, Grid

_Value = Callable[[str], float | None]
"""The value of a row: its score on one domain, or its mean."""


def benchmark_page(
    table: Table,
    comparison: Comparison | None = None,
    updates: Mapping[str, Any] | None = None,
    configuration: str = "",
    facts: Sequence[tuple[str, str]] = (),
) -> Page:
    """Build the page of a leave-one-domain-out benchmark.

    Args:
        table: The scores of every row on every domain.
        comparison: What the experts have in common, see :func:`lightning_merge.analysis.compare_experts`.
        updates: The relative length of each method's update, by held-out domain, method and group of layers.
        configuration: The YAML that makes it again; none if empty.
        facts: Names and values that stand below the title.
    """
    first, *others = table.grids()
    sections = [
        Section("Best method on each domain", [winners(table)]),
        Section("Scores", [first, PLACES, *_pictures(table)]),
    ]
    if comparison is not None:
        sections += [agreement(comparison), layers(comparison, updates)]
    sections += [Section("Scores by other metrics", others), *again(configuration)]
    return Page(
        f"{count(len(_methods(table)), 'method')}, {count(len(table.domains), 'domain')} left out in turn",
        [*_answers(table), *(experts_in_words(comparison) if comparison else ())],
        sections,
        [*_warnings(table), *(suspicions(comparison) if comparison else ())],
        facts,
    )


def foundations_page(table: FoundationsTable, configuration: str = "", facts: Sequence[tuple[str, str]] = ()) -> Page:
    """Build the page of a benchmark over several foundations."""
    methods = table.names("method")
    pictures = [
        Picture(plot_tasks(table, method), f"{method}, by the number of tasks", table.caption) for method in methods
    ]
    sections = [Section("Scores", [*table.grids(), *pictures])]
    sections += again(configuration)
    seeds = table.names("seed")
    return Page(
        f"{count(len(table.names('arm')), 'way')} to merge experts of several foundations",
        list(_foundation_answers(table)),
        sections,
        [] if len(seeds) > 1 else [_ONE_RUN],
        facts,
    )


def winners(table: Table) -> Grid:
    """Tabulate which method is best on each domain, and by how much."""
    has_experts = table.mean(OWN_EXPERT) is not None
    header = ["domain", "best method", _name(table), "ahead of the next", "over the base"]
    header += ["below the own expert"] if has_experts else []
    columns: dict[str, _Value] = {domain: partial(table.value, domain=domain) for domain in table.domains}
    rows = [_winner(table, name, value, has_experts) for name, value in [*columns.items(), ("mean", table.mean)]]
    caption = (
        f"{_name(table).capitalize()} in %, differences in points; of many equally good methods the first are named."
    )
    return Grid(header, [row for row in rows if row], caption)


def _winner(table: Table, name: str, value: _Value, has_experts: bool) -> list[Cell]:
    ranked = _ranked(table, value)
    if not ranked:
        return []
    best = ranked[0][1]
    first = [row for row, score in ranked if score == best]
    behind = [score for _, score in ranked if score != best]
    references = [behind[0] if behind else None, value(BASE), *([value(OWN_EXPERT)] if has_experts else [])]
    signs = [1, 1, -1]
    cells = [Cell(name), Cell(listed(first)), Cell(percent(best), best)]
    for reference, sign in zip(references, signs, strict=False):
        difference = None if reference is None else sign * (best - reference)
        cells.append(Cell("" if difference is None else points(difference), difference))
    return cells


def _answers(table: Table) -> Iterator[str]:
    ranked = _ranked(table, table.mean)
    if not ranked:
        yield "No method was measured on every domain."
        return
    best = ranked[0][1]
    first = [row for row, value in ranked if value == best]
    where = f"the {count(len(table.domains), 'domain')} that none of its experts has seen"
    yield f"{listed(first)}: {percent(best)} % {_name(table)}, the best mean over {where}."
    against = {"the base": table.mean(BASE), "the domains' own experts": table.mean(OWN_EXPERT)}
    said = [
        f"{points(abs(best - value))} points {'above' if best >= value else 'below'} {what} ({percent(value)} %)"
        for what, value in against.items()
        if value is not None and math.isfinite(value)
    ]
    if said:
        yield f"That is {listed(said)}."
    behind = [(row, value) for row, value in ranked if value != best]
    if behind:
        row, value = behind[0]
        yield f"Next is {row} with {percent(value)} %, {points(abs(best - value))} points behind."
    ranked_by_domain = {domain: _ranked(table, partial(table.value, domain=domain)) for domain in table.domains}
    firsts = [(domain, *ranked[0]) for domain, ranked in ranked_by_domain.items() if ranked]
    if len({row for _, row, _ in firsts}) > 1:
        leaders = listed([f"{row} on {domain} ({percent(value)} %)" for domain, row, value in firsts])
        yield f"No method is the best everywhere: {leaders}."


def _foundation_answers(table: FoundationsTable) -> Iterator[str]:
    for merged in table.names("merged"):
        means = {
            (arm, method): cell.mean
            for arm in table.names("arm")
            for method in table.names("method")
            if (cell := table.cell(merged, arm, method)).average and math.isfinite(cell.mean)
        }
        if means:
            (arm, method), value = max(means.items(), key=lambda item: item[1])
            yield (
                f"{count(merged, 'task')}: {arm} with {method} reaches {percent(value)} % of the experts' accuracy, "
                f"the most of {count(len(means), 'combination')}."
            )


PLACES = (
    "The best method of each column is bold, the second best underlined; what methods are compared with has no place."
)

_ONE_RUN = (
    "Every number is of one run with one seed; methods that lie within a point or two of each other may change places "
    "in another run."
)


def _warnings(table: Table) -> Iterator[str]:
    yield _ONE_RUN
    rows = table.row_names
    if len(table.domains) == 2:
        yield "With two domains every merge is of one expert alone; more domains make a merge of several."
    broken = [row for row in rows if any(math.isnan(value) for value in table.values(row))]
    if broken:
        yield f"Scores that are not numbers: {listed(broken)}. The merged weights or the metric were not finite there."
    missing = [row for row in rows if len(table.values(row)) < len(table.domains)]
    if missing:
        yield f"Not measured on every domain, so without a mean: {listed(missing)}."
    base = table.mean(BASE)
    worse = [row for row, value in _ranked(table, table.mean) if base is not None and _is_worse(table, value, base)]
    if worse:
        yield f"Worse than the base that was merged onto, on average: {listed(worse)}."


def _is_worse(table: Table, value: float, other: float) -> bool:
    return value > other if table.lower_is_better else value < other


def _ranked(table: Table, value: _Value) -> list[tuple[str, float]]:
    """Rank the methods that have a finite value, the best first."""
    scores = [(row, score) for row in _methods(table) if (score := value(row)) is not None and math.isfinite(score)]
    return sorted(scores, key=lambda item: item[1] if table.lower_is_better else -item[1])


def _pictures(table: Table) -> list[Picture]:
    return [
        Picture(
            plot_heat_map(table),
            "Domains and methods",
            f"{_name(table).capitalize()} of every row on every domain; a frame marks the best method of each domain.",
        ),
        Picture(
            plot_domains(table),
            "Domain by domain",
            "Some of the best methods beside what they are compared with, in percent of the domain's own expert.",
        ),
    ]


def _methods(table: Table) -> list[str]:
    return [row for row in table.row_names if is_method(row)]


def _name(table: Table) -> str:
    return table.metric.replace("_", " ")
