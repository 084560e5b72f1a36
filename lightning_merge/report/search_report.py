"""The report of a search: what every setting reaches on the validation splits of the experts' domains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lightning_merge.evaluation.held_out import is_method
from lightning_merge.evaluation.table import Table
from lightning_merge.report.page import Page, Picture, Section, again
from lightning_merge.report.plots import plot_sweep
from lightning_merge.report.words import count, listed, percent


def search_page(
    table: Table, chosen: str, method: str, configuration: str = "", facts: Sequence[tuple[str, str]] = ()
) -> Page:
    """Build the page of a search.

    Args:
        table: The scores of every setting, and those of the domains' own experts.
        chosen: The name of the row that was merged.
        method: The name of the method.
        configuration: The YAML that makes it again; none if empty.
        facts: Names and values that stand below the title.
    """
    settings = [row for row in table.row_names if is_method(row)]
    picture = Picture(
        plot_sweep(table),
        "Normalized accuracy by the coefficient",
        "Each domain's accuracy divided by that of its own expert, averaged over the domains; a line for each setting "
        "of the other fields.",
    )
    return Page(
        f"{method}: {count(len(settings), 'setting')} on {count(len(table.domains), 'domain')}",
        [*_answers(table, settings), f"Merged was {chosen}."],
        [Section("Scores, drawn", [picture]), Section("Scores", table.grids()), *again(configuration)],
        [_CHOSEN],
        facts,
    )


_CHOSEN = (
    "These are validation splits of the domains that are merged, on which the setting was chosen; a fair score is on a "
    "domain that was left out."
)


def _answers(table: Table, settings: Sequence[str]) -> Iterator[str]:
    measured = {row: value for row in settings if (value := table.normalized(row)) is not None}
    finite = {row: value for row, value in measured.items() if math.isfinite(value)}
    if finite:
        best = max(finite.values())
        names = listed([row for row, value in finite.items() if value == best])
        yield f"{names}: {percent(best)} % of the own experts' accuracy, the best of {count(len(finite), 'setting')}."
        row, worst = min(finite.items(), key=lambda item: item[1])
        if worst < best:
            yield f"The worst, {row}, reaches {percent(worst)} %."
