"""The tables of several foundations against numbers computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lightning_merge.evaluation.benchmark.foundations_table import FoundationsTable

REACHED = {("naive", "TA"): 0.2, ("naive", "average"): 0.4, ("aligned", "TA"): 0.6, ("aligned", "average"): 0.4}


def records(seeds=(0,), reached=REACHED, **changes):
    return [
        {"seed": seed, "merged": merged, "arm": arm, "method": method, "task": task, "accuracy": value, "expert": 0.8}
        | changes
        for seed in seeds
        for merged in (2, 3)
        for (arm, method), value in reached.items()
        for task in ("cats", "dogs")
    ]


def test_a_grid_for_each_number_of_tasks():
    table = FoundationsTable(records())
    grids = table.grids()
    assert [grid.header for grid in grids] == [["2 tasks", "TA", "average"], ["3 tasks", "TA", "average"]]
    assert [[(cell.text, cell.place) for cell in row] for row in grids[0].rows] == [
        [("naive", None), ("25.0 (25.0)", 2), ("50.0 (50.0)", 1)],
        [("aligned", None), ("75.0 (75.0)", 1), ("50.0 (50.0)", 1)],
    ]
    assert grids[0].rows[1][1].value == pytest.approx(0.75)


def test_markdown_has_every_grid_and_one_caption():
    table = FoundationsTable(records())
    lines = table.markdown().splitlines()
    assert lines[:4] == [
        "| 2 tasks |              TA |         average |",
        "|---------|----------------:|----------------:|",
        "| naive   |     25.0 (25.0) | **50.0 (50.0)** |",
        "| aligned | **75.0 (75.0)** | **50.0 (50.0)** |",
    ]
    assert lines[4:6] == ["", "| 3 tasks |              TA |         average |"]
    assert lines[-1] == table.caption
    assert len(lines) == 11


def test_what_is_no_number_is_never_best():
    table = FoundationsTable(records(seeds=(0, 1), reached=REACHED | {("aligned", "TA"): math.nan}))
    column = [row[1] for row in table.grids()[0].rows]
    assert [(cell.text, cell.place) for cell in column] == [("25.0 ± 0.0 (25.0)", 1), ("nan (nan)", None)]
    lost = FoundationsTable(records(expert=math.nan))
    assert {cell.text for row in lost.grids()[0].rows for cell in row[1:]} == {"nan (nan)"}


def test_files():
    table = FoundationsTable(records())
    table.save("out")
    assert Path("out/table.md").read_text() == table.markdown() + "\n"
    assert Path("out/table.tex").read_text().count(r"\end{tabular}") == 2
    assert r"naive & \underline{25.0 (25.0)} & \textbf{50.0 (50.0)} \\" in Path("out/table.tex").read_text()
    assert len(Path("out/table.csv").read_text().splitlines()) == 1 + len(table.records)
