"""The table against numbers computed by hand."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_merge.evaluation import Table


def record(row, domain, value):
    return {
        "row": row,
        "domain": domain,
        "accuracy": value,
        "balanced_accuracy": value,
        "f1": value,
        "calibration_error": value / 10,
    }


@pytest.fixture
def table():
    values = {
        "own expert": (0.8, 0.9),
        "A|B": (0.4, 0.72),
        "expert sketch": (0.1, 0.1),
        "SCORE": (0.6, 0.63),
        "base": (0.2, 0.3),
    }
    return Table(
        [record(row, d, v) for row, both in values.items() for d, v in zip(("art", "photo"), both, strict=True)]
    )


def test_rows_are_base_methods_and_own_expert(table):
    assert table.row_names == ["base", "A|B", "SCORE", "own expert"]


def test_numbers(table):
    assert table.mean("SCORE") == pytest.approx(0.615)
    assert table.worst("A|B") == 0.4
    assert table.normalized("SCORE") == pytest.approx((0.6 / 0.8 + 0.63 / 0.9) / 2)
    assert Table(table.records, "calibration_error").worst("SCORE") == 0.063


def test_markdown(table):
    assert table.markdown().splitlines() == [
        "| method     |      art |    photo |     mean |    worst | normalized |",
        "|------------|---------:|---------:|---------:|---------:|-----------:|",
        "| base       |     20.0 |     30.0 |     25.0 |     20.0 |       29.2 |",
        "| A\\|B       |     40.0 | **72.0** |     56.0 |     40.0 |       65.0 |",
        "| SCORE      | **60.0** |     63.0 | **61.5** | **60.0** |   **72.5** |",
        "| own expert |     80.0 |     90.0 |     85.0 |     80.0 |      100.0 |",
        "",
        "Accuracy in % on each domain; normalized: divided by that of the domain's own expert, then averaged over the "
        "domains.",
    ]


def test_lower_calibration_error_is_better(table):
    lines = Table(table.records, "calibration_error").markdown().splitlines()
    assert "normalized" not in lines[0]
    assert "**4.0**" in lines[3]


def test_what_was_not_measured_is_empty():
    table = Table([record("base", "art", 0.5), record("base", "photo", 0.5), record("A", "art", 0.4)])
    assert table.line("A") == [0.4, None, None, None]
    assert "normalized" not in table.header


def test_files(table):
    table.save("out")
    assert [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()] == list(table.records)
    with Path("out/table.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == table.header
    assert float(rows[3][1]) == 0.6
    assert Path("out/table.md").read_text().count("| SCORE ") == 4
    latex = Path("out/table.tex").read_text()
    assert latex.count(r"\end{tabular}") == 4
    assert r"SCORE & \textbf{60.0} & \underline{63.0} & \textbf{61.5} & \textbf{60.0} & \textbf{72.5} \\" in latex


def test_places(table):
    rows = {row[0].text: row for row in table.grid().rows}
    assert [cell.place for cell in rows["SCORE"]] == [None, 1, 2, 1, 1, 1]
    assert [cell.place for cell in rows["A|B"]] == [None, 2, 1, 2, 2, 2]
    assert {cell.place for row in ("base", "own expert") for cell in rows[row]} == {None}
    assert rows["SCORE"][5].value == table.normalized("SCORE")
    errors = {row[0].text: row for row in replace(table, metric="calibration_error").grid().rows}
    assert [cell.place for cell in errors["A|B"]] == [None, 1, 2, 1, 2]


def test_a_lone_method_and_a_lone_domain():
    records = [record(row, "art", value) for row, value in (("base", 0.9), ("A", 0.4), ("own expert", 0.8))]
    grid = Table(records).grid()
    assert grid.header == ["method", "art", "mean", "worst", "normalized"]
    assert {cell.place for row in grid.rows for cell in row} == {None}


def test_what_is_no_number_is_shown_and_never_best():
    values = {"A": (math.nan, 0.5), "B": (0.4, math.nan), "C": (0.2, 0.3), "own expert": (0.8, 0.9)}
    table = Table([record(row, d, v) for row, both in values.items() for d, v in zip("xy", both, strict=True)])
    for row in "AB":
        assert all(math.isnan(found(row)) for found in (table.mean, table.worst, table.normalized))
    assert table.markdown().splitlines()[2:5] == [
        "| A          |      nan | **50.0** |      nan |      nan |        nan |",
        "| B          | **40.0** |      nan |      nan |      nan |        nan |",
        "| C          |     20.0 |     30.0 | **25.0** | **20.0** |   **29.2** |",
    ]
    assert table.csv().splitlines()[1] == "A,nan,0.5,nan,nan,nan"
    assert math.isnan(replace(table, metric="calibration_error").worst("A"))
    lost = Table([*table.records[:-1], record("own expert", "y", math.nan)])
    assert math.isnan(lost.normalized("C"))
