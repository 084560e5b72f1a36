"""A table as it is shown: in Markdown, LaTeX, CSV and HTML it has the same cells."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_merge.utilities.terminal import visible

Place = Literal[1, 2]
"""The place of a cell in its column: the best, or the second."""

_MARKDOWN = re.compile(r"[\\|`*<$~\[\]]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
"""What Markdown (GitHub's, too) would take for more than a character; not the ``_`` within a word."""
_LATEX = {
    **{character: f"\\{character}" for character in "{}$&#_%"},
    **{character: f"{{{character}}}" for character in "[]*"},  # at the begin of a row LaTeX reads `\\[` and `\\*`
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
}
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")
"""What a formula of a spreadsheet may begin with."""
_PREAMBLE = r"% needs \usepackage{booktabs}; for letters other than Latin XeLaTeX or LuaLaTeX, and a font with them"


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: As it is shown, rounded; plain text.
        value: The number behind it, unrounded, which a table is sorted by and CSV holds; None where the text is all.
        place: 1 for the best of its column, 2 for the second.
        markdown: How Markdown says it where that is more than the text: a link, code.
    """

    text: str
    value: float | str | None = None
    place: Place | None = None
    markdown: str | None = None


@dataclass(frozen=True)
class Grid:
    """A table of cells; the first cell of a row is its name.

    Args:
        header: The names of the columns.
        rows: The rows, each as long as the header.
        caption: What the cells are, in a sentence; plain text.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    @property
    def holds_text(self) -> list[bool]:
        """Which columns hold text, and stand at the left: the first one, and those with a text that is no number."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.header)
        return [
            not i or any(c.text and not isinstance(c.value, (int, float)) for c in x) for i, x in enumerate(columns)
        ]

    def markdown_lines(self, *, ragged: bool = False) -> list[str]:
        """Write the table in Markdown, the best of a column in bold: the header, a rule, and a line for each row.

        They are readable as they are: text to the left, numbers to the right, all padded to one width.

        Args:
            ragged: Leave the last column, of text, as wide as it is in each row; for one that is too long to pad.
        """
        lines = [[as_markdown(name) for name in self.header], *([_markdown(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        if ragged:
            widths[-1] = len(lines[0][-1])
        columns = list(zip(widths, self.holds_text, strict=True))

        def join(cells: Sequence[str]) -> str:
            padded = [
                c.ljust(width) if text else c.rjust(width) for c, (width, text) in zip(cells, columns, strict=True)
            ]
            return f"| {' | '.join(padded)} |"

        rule = f"|{'|'.join('-' * (width + 1) + ('-' if text else ':') for width, text in columns)}|"
        return [join(lines[0]), rule, *map(join, lines[1:])]

    def markdown(self) -> str:
        """Write the table in Markdown, the best of a column in bold, and the caption below it."""
        caption = ["", as_markdown(self.caption)] if self.caption else []
        return "\n".join([*self.markdown_lines(), *caption])

    def latex(self) -> str:
        """Write the table in LaTeX with ``booktabs``, the best of a column in bold and the second underlined."""

        def join(cells: Sequence[str]) -> str:
            return f"    {' & '.join(cells)} \\\\"

        caption = [f"  \\caption{{{as_latex(self.caption)}}}"] if self.caption else []
        return "\n".join(
            [
                _PREAMBLE,
                r"\begin{table}",
                r"  \centering",
                *caption,
                f"  \\begin{{tabular}}{{{''.join('l' if text else 'r' for text in self.holds_text)}}}",
                r"    \toprule",
                join([as_latex(name) for name in self.header]),
                r"    \midrule",
                *(join([_latex(cell) for cell in row]) for row in self.rows),
                r"    \bottomrule",
                r"  \end{tabular}",
                r"\end{table}",
            ]
        )

    def csv(self) -> str:
        """Write the table as CSV, with unrounded numbers."""
        rows = ([cell.text if cell.value is None else cell.value for cell in row] for row in self.rows)
        return as_csv([self.header, *rows])


def places(values: Sequence[float | None], *, lower_is_better: bool = False) -> list[Place | None]:
    """Rank values: 1 for the best, 2 for the second; equal ones share a place, and what is not finite has none."""
    finite = {value for value in values if value is not None and math.isfinite(value)}
    ranked: list[float | None] = [*sorted(finite, reverse=not lower_is_better), None, None]
    first, second = ranked[:2]
    return [None if value is None else 1 if value == first else 2 if value == second else None for value in values]


def as_markdown(text: str) -> str:
    """Escape plain text for one line of Markdown, or for a cell of its tables."""
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text))


def as_latex(text: str) -> str:
    """Escape plain text for one line of LaTeX."""
    escaped = "".join(_LATEX.get(character, character) for character in one_line(text))
    return re.sub("-(?=-)", "-{}", escaped)  # two in a row are a dash


def one_line(text: str) -> str:
    """Put a text on one line, with a space for a line break, and other characters that cannot be printed escaped."""
    return visible(" ".join(text.split()))


def as_csv(rows: Iterable[Iterable[Any]]) -> str:
    """Write rows of numbers and texts as CSV; what a spreadsheet would execute has an apostrophe before it.

    Spreadsheets take a text for a formula, which may call other programs, if it begins with one of a few characters.
    """
    return "".join(map(_csv_line, rows))


def _csv_line(cells: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow([f"'{cell}" if _is_formula(cell) else cell for cell in cells])
    return line.getvalue().removesuffix("\r\n") + "\n"  # a line that ends in both quotes either within a cell


def _is_formula(cell: Any) -> bool:
    """Tell whether a spreadsheet would execute a cell: a text that begins like a formula and is no number."""
    if not isinstance(cell, str) or not cell.lstrip(" \n").startswith(_FORMULA):
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False


def _markdown(cell: Cell) -> str:
    text = as_markdown(cell.text) if cell.markdown is None else cell.markdown
    return f"**{text}**" if cell.place == 1 else text


def _latex(cell: Cell) -> str:
    text = as_latex(cell.text)
    marked: dict[Place | None, str] = {1: f"\\textbf{{{text}}}", 2: f"\\underline{{{text}}}"}
    return marked.get(cell.place, text)
