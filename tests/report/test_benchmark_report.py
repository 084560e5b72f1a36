"""The report of a benchmark: its numbers are those of the records, and whatever they are it is there."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_merge.analysis import compare_experts
from lightning_merge.evaluation import Table
from lightning_merge.evaluation.benchmark.foundations_table import FoundationsTable
from lightning_merge.models.metrics import METRICS
from lightning_merge.report import Grid, Page, render
from lightning_merge.report.benchmark_report import benchmark_page, foundations_page, winners
from tests.report.pages import NASTY
from tests.toys import base_weights, expert_weights


def table(rows: dict[str, list[float]], domains: list[str]) -> Table:
    return Table(
        [
            {"row": row, "domain": domain, **dict.fromkeys(METRICS, value)}
            for row, values in rows.items()
            for domain, value in zip(domains, values, strict=True)
        ]
    )


ROWS = {
    "base": [0.20, 0.30],
    "TIES": [0.65, 0.60],
    "SCORE": [0.50, 0.70],
    "Task Arithmetic": [0.10, 0.40],
    "own expert": [0.90, 0.80],
}


def texts(page: Page) -> str:
    return "\n".join([*page.summary, *page.warnings])


def grids(page: Page) -> list[Grid]:
    return [part for section in page.sections for part in section.parts if isinstance(part, Grid)]


def test_the_answers_by_hand():
    """Means: TIES .625, SCORE .6, Task Arithmetic .25, base .25, own expert .85."""
    page = benchmark_page(table(ROWS, ["photo", "sketch"]))
    assert page.title == "3 methods, 2 domains left out in turn"
    assert page.summary == [
        "TIES: 62.5 % accuracy, the best mean over the 2 domains that none of its experts has seen.",
        "That is 37.5 points above the base (25.0 %) and 22.5 points below the domains' own experts (85.0 %).",
        "Next is SCORE with 60.0 %, 2.5 points behind.",
        "No method is the best everywhere: TIES on photo (65.0 %) and SCORE on sketch (70.0 %).",
    ]


def test_by_how_much():
    grid = winners(table(ROWS, ["photo", "sketch"]))
    found = [[cell.text for cell in row] for row in grid.rows]
    assert found == [
        ["photo", "TIES", "65.0", "15.0", "45.0", "25.0"],
        ["sketch", "SCORE", "70.0", "10.0", "40.0", "10.0"],
        ["mean", "TIES", "62.5", "2.5", "37.5", "22.5"],
    ]
    assert grid.rows[2][3].value == pytest.approx(0.025)


def test_methods_that_are_equal_are_all_named():
    rows = {"base": [0.1], "A": [0.5], "B": [0.5], "C": [0.4]}
    (row, _) = winners(table(rows, ["photo"])).rows
    assert [cell.text for cell in row] == ["photo", "A and B", "50.0", "10.0", "40.0"]


def test_lower_is_better_for_errors():
    found = Table(table(ROWS, ["photo", "sketch"]).records, "calibration_error")
    assert [row[1].text for row in winners(found).rows] == ["Task Arithmetic", "Task Arithmetic", "Task Arithmetic"]


def test_the_tables_are_those_of_the_files(tmp_path):
    found = table(ROWS, ["photo", "sketch"])
    found.save(tmp_path)
    shown = [grid for grid in grids(benchmark_page(found)) if grid.header[0] == "method"]
    assert "\n\n".join(grid.markdown() for grid in shown) + "\n" == (tmp_path / "table.md").read_text()
    assert shown[0].csv() == (tmp_path / "table.csv").read_text()


@pytest.mark.parametrize(
    ("rows", "domains", "warning"),
    [
        ({"base": [0.5], "A": [math.nan]}, ["photo"], "not numbers: A"),
        ({"base": [0.5], "A": [0.4]}, ["photo"], "Worse than the base that was merged onto, on average: A"),
        ({"A": [0.4]}, ["photo"], "one run with one seed"),
        ({"base": [0.5], **{f"method {i}": [0.6] for i in range(40)}}, ["photo"], "one run"),
        ({"base": [0.5], **{name: [0.6] for name in NASTY}}, NASTY[:1], "one run"),
    ],
)
def test_whatever_the_records_are_there_is_a_page(rows: dict[str, Any], domains: list[str], warning: str):
    page = benchmark_page(table(rows, domains))
    assert warning in texts(page)
    html = render(page)
    assert "<script>document.title" not in html


def test_what_was_not_measured_is_said():
    records = [*table(ROWS, ["photo", "sketch"]).records, *table({"Iso-C": [0.3]}, ["photo"]).records]
    assert "Not measured on every domain, so without a mean: Iso-C." in texts(benchmark_page(Table(records)))


def test_what_experts_have_in_common_stands_beside():
    base = base_weights()
    experts = {name: expert_weights(base, i) for i, name in enumerate(("photo", "sketch"))}
    updates = {"photo": {"TIES": {"mlp": 0.5, "proj": 1.5}}, "sketch": {"TIES": {"mlp": 1.5}}}
    page = benchmark_page(table(ROWS, ["photo", "sketch"]), compare_experts(base, experts), updates, "seed: 1")
    titles = [section.title for section in page.sections]
    assert titles[2:4] == ["Where the experts agree and fight", "What happened to each layer"]
    drawn = page.figures["How far each method moves each layer"].axes[0]
    assert [text.get_text() for text in drawn.texts] == ["1.0", "1.5"]  # the mean over the domains
    assert "seed: 1" in render(page)


def test_several_foundations():
    def records(arm: str, method: str, accuracy: float) -> list[dict[str, Any]]:
        keys = {"seed": 0, "merged": 2, "arm": arm, "method": method}
        return [keys | {"task": task, "accuracy": accuracy, "expert": 0.8} for task in ("mnist", "usps")]

    found = FoundationsTable([*records("naive", "TIES", 0.2), *records("weights + TACT", "TIES", 0.6)])
    page = foundations_page(found)
    assert page.summary == [
        "2 tasks: weights + TACT with TIES reaches 75.0 % of the experts' accuracy, the most of 2 combinations."
    ]
    assert "one seed" in texts(page)
    assert render(page)


@pytest.mark.parametrize("updates", [{}, {"photo": {}}, {"photo": {"TIES": {}}}])
def test_nothing_is_known_of_updates(updates):
    """As of benchmarks that were run before there were any, or whose experts are the base itself."""
    base = base_weights()
    comparison = compare_experts(base, {"photo": base, "sketch": base})
    page = benchmark_page(table(ROWS, ["photo", "sketch"]), comparison, updates)
    assert "How far each method moves each layer" not in page.figures
    assert render(page)


def test_a_domain_that_is_called_mean():
    assert [row[0].text for row in winners(table(ROWS, ["mean", "sketch"])).rows] == ["mean", "sketch", "mean"]
