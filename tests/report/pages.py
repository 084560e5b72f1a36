"""Pages to look at: an ordinary one, one with many methods, one with a single one, one with names that attack."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from lightning_merge.report.page import Listing, Page, Picture, Section
from lightning_merge.utilities.grid import Cell, Grid, places

NASTY = (
    "<script>document.title = 'taken'</script>",
    "</script><script>document.title = 'taken'</script>",
    "</style></title></textarea><img src=x onerror=\"document.title = 'taken'\">",
    "\"'`><svg onload=\"document.title = 'taken'\">",
    "{{ 7 * 7 }} {% raw %} ${7 * 7} &amp; &lt; | ** __ \\ # %",
    "an_expert_whose_name_never_ends_" * 20,
    "two\nlines\tand a tab",
    "Δθ · ελληνικά · 合并 · مدمج · 🧪",
    "",
)


def scores(rows: list[str], domains: list[str], values: list[list[float | None]]) -> Grid:
    """A table in percent with the best and the second of every column."""
    marks = list(zip(*(places(column) for column in zip(*values, strict=True)), strict=True))
    cells = [
        [Cell(name, name), *(Cell(_percent(value), value, mark) for value, mark in zip(line, mark_line, strict=True))]
        for name, line, mark_line in zip(rows, values, marks, strict=True)
    ]
    return Grid(["method", *domains], cells, "Accuracy in % on each domain.")


def ordinary() -> Page:
    """One whose scores on ``photo`` differ in digits that are not shown, are NaN, infinite, and missing."""
    rows = ["base", "TIES", "SCORE", "Iso-C", "10", "9"]
    photo = [0.50041, 0.50039, math.nan, 0.9, None, -math.inf]
    sketch = [0.1, 0.5, 0.25, 1.0, 0.04, 0.3]
    values = [list(line) for line in zip(photo, sketch, strict=True)]
    return page(
        scores(rows, ["photo", "sketch"], values), Picture(figure("accuracy"), "By domain", "Higher is better.")
    )


def many(methods: int, domains: int) -> Page:
    """Scores of so many methods on so many domains."""
    values = [[(37 * i + 11 * j) % 101 / 101 for j in range(domains)] for i in range(methods)]
    return page(scores([f"method {i}" for i in range(methods)], [f"domain_{j}" for j in range(domains)], values))


def nasty() -> Page:
    """Every place that takes a text takes each of the nasty ones."""
    grid = scores(list(NASTY), list(NASTY), [[i / 10 + j / 100 for j in range(9)] for i in range(9)])
    grid = Grid(grid.header, grid.rows, " ".join(NASTY))
    pictures = [Picture(figure(NASTY[1]), " ".join(NASTY), " ".join(NASTY))]
    listings = [Listing(name, name, folded=bool(i % 2)) for i, name in enumerate(NASTY)]
    sections = [
        Section(NASTY[0], [*NASTY, grid, *pictures, *pictures, *listings]),
        *(Section(name, []) for name in NASTY),
    ]
    return Page(" ".join(NASTY), NASTY, sections, NASTY, [(name, name) for name in NASTY])


def page(grid: Grid, *pictures: Picture) -> Page:
    """A page around a table."""
    parts = ["What was measured.", grid, *pictures]
    listings = [Listing("method: SCORE\nseed: 0\n", "merge.yaml", folded=True), Listing("lightning-merge", "Command")]
    sections = [Section("Results", parts), Section("Configuration", listings)]
    return Page("A benchmark", ["SCORE is first."], sections, ["One seed."], [("made", "today"), ("experts", "4")])


def figure(label: str) -> Figure:
    """A line, and an image, and a text."""
    drawn = Figure(figsize=(7.2, 3))
    line, image = drawn.subplots(1, 2)
    line.plot([0, 1, 2], [1, 3, 2])
    line.set_ylabel(label.replace("$", ""))
    image.imshow([[0.0, 1.0], [2.0, 3.0]])
    return drawn


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
