"""Tables as they are shown: what other programs read in them is what was put in."""

from __future__ import annotations

import csv
import io
import math
import re

import pytest

from lightning_merge.report import Cell, Grid
from lightning_merge.utilities.grid import as_markdown, one_line, places

ODD = [
    "a|b",
    "two\nlines",
    "`code` and ``more``",
    "<script>alert('x')</script>",
    '"quoted" & &amp; \\| \\',
    "__init__ *bold* ~~gone~~ art_painting",
    "[link](javascript:alert) ![x](y)",
    "$x_1^2$ {50 %} #1 ~",
    "[12pt] * -- ---",
    "\u2028é ± 日本\x00\x1b",
    "long " * 60,
]


def number(value: float, place=None) -> Cell:
    return Cell(f"{value:.1f}", value, place)


def odd_grid() -> Grid:
    return Grid(["method", *ODD], [[Cell(name), *(number(i + 0.123) for i in range(len(ODD)))] for name in ODD], ODD[3])


def test_markdown():
    grid = Grid(["method", "a"], [[Cell("SCORE"), number(60, 1)], [Cell("TIES"), number(5.25, 2)]], "What it is.")
    lines = [
        "| method |        a |",
        "|--------|---------:|",
        "| SCORE  | **60.0** |",
        "| TIES   |      5.2 |",
    ]
    assert grid.markdown_lines() == lines
    assert grid.markdown() == "\n".join([*lines, "", "What it is."])
    assert Grid(["method"], [[Cell("SCORE")]]).markdown() == "| method |\n|--------|\n| SCORE  |"


def test_a_cell_may_be_more_than_text_in_markdown_alone():
    grid = Grid(["paper"], [[Cell("A & B_", markdown="[A & B\\_](https://x)")], [Cell("`C`", markdown="`C`")]])
    assert grid.markdown_lines()[2:] == ["| [A & B\\_](https://x) |", "| `C`                  |"]
    assert "https" not in grid.latex() + grid.csv()
    assert r"A \& B\_ \\" in grid.latex()
    assert "A & B_" in grid.csv()


def test_a_last_column_too_long_to_pad():
    grid = Grid(["a", "text"], [[Cell("1", 1), Cell("x" * 30)], [Cell("22", 22), Cell("y")]])
    lines = grid.markdown_lines(ragged=True)
    assert lines == ["| a  | text |", "|----|------|", f"| 1  | {'x' * 30} |", "| 22 | y    |"]
    assert len({len(line) for line in grid.markdown_lines()}) == 1


def test_text_stands_at_the_left():
    grid = Grid(
        ["model", "file", "experts"], [[Cell("base"), Cell("a.ckpt"), Cell("")], [Cell("A"), Cell(""), number(2)]]
    )
    assert grid.holds_text == [True, True, False]
    assert grid.markdown_lines()[1:3] == ["|-------|--------|--------:|", "| base  | a.ckpt |         |"]
    assert r"\begin{tabular}{llr}" in grid.latex()
    assert Grid(["model", "file"], []).holds_text == [True, False]


def test_a_reader_of_markdown_finds_the_names_and_nothing_else():
    reader = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = reader.parse(odd_grid().markdown())
    cells = [token.children for token in tokens if token.type == "inline"]
    kinds = {child.type for children in cells for child in children}
    assert kinds <= {"text", "text_special"}  # neither HTML, nor code, links, or emphasis
    texts = ["".join(child.content for child in children) for children in cells]
    names = [one_line(name) for name in ODD]
    width = len(ODD) + 1
    assert texts[:width] == ["method", *names]
    assert texts[width:-1:width] == names
    assert texts[-1] == names[3]  # the caption


def test_names_within_words_are_left_as_they_are():
    assert as_markdown("art_painting, AT&T, TSV-M (no task) 0.3 C++") == "art_painting, AT&T, TSV-M (no task) 0.3 C++"


def check_latex(text: str, columns: int, rows: int) -> None:
    """See that environments and braces are balanced, and that every row has as many cells as there are columns."""
    first, *lines = text.split("\n")
    assert first.startswith("%")
    assert r"\usepackage{booktabs}" in first
    text = "\n".join(lines)
    stack = []
    for what, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if what == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack
    bare = text.replace(r"\{", "").replace(r"\}", "")
    depth = [(character == "{") - (character == "}") for character in bare]
    assert sum(depth) == 0
    assert all(sum(depth[:i]) >= 0 for i in range(0, len(depth), 7))
    assert re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1] == "l" + "r" * (columns - 1)
    body = [line for line in lines if line.endswith(r"\\")]
    assert len(body) == rows + 1
    for line in body:
        assert len(re.findall(r"(?<!\\)&", line)) == columns - 1
        assert line.count("\\\\") == 1
        assert not re.search(r"(?<!\\)[$#_%]|[~^<>|`]|--", line)
    assert re.findall(r"\\(?:top|mid|bottom)rule", text) == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert not re.search(r"(rule|\\\\)\s*[\[*]", text)


def test_latex():
    grid = Grid(["method", "a"], [[Cell("A & B"), number(60, 1)], [Cell("TIES"), number(5.25, 2)]], "In %.")
    text = grid.latex()
    check_latex(text, 2, 2)
    assert r"A \& B & \textbf{60.0} \\" in text
    assert r"TIES & \underline{5.2} \\" in text
    assert r"\caption{In \%.}" in text
    assert r"\caption" not in Grid(["method"], [[Cell("SCORE")]]).latex()


def test_latex_of_odd_names():
    check_latex(odd_grid().latex(), len(ODD) + 1, len(ODD))


def test_csv_has_all_digits():
    grid = Grid(["method", "a"], [[Cell('a "b", c'), number(0.1 + 0.2)], [Cell("B"), Cell("")]])
    assert list(csv.reader(io.StringIO(grid.csv()))) == [["method", "a"], ['a "b", c', repr(0.1 + 0.2)], ["B", ""]]


@pytest.mark.parametrize(
    ("values", "lower", "expected"),
    [
        ([0.5, 0.7, 0.6], False, [None, 1, 2]),
        ([0.5, 0.7, 0.6], True, [1, None, 2]),
        ([0.7, 0.7, 0.6, 0.6, 0.1], False, [1, 1, 2, 2, None]),
        ([math.nan, 0.2, None, math.inf], False, [None, 1, None, None]),
        ([math.nan, 0.2, None, 0.3], True, [None, 1, None, 2]),
        ([None, math.nan], False, [None, None]),
        ([], False, []),
    ],
)
def test_places(values, lower, expected):
    assert places(values, lower_is_better=lower) == expected
