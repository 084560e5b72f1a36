"""A table as it is shown: in Markdown, LaTeX, CSV and HTML it has the same cells."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Cell:
    """What stands in a table.

    Args:
        text: As it is shown, rounded.
        value: The number behind it, unrounded, which a table is sorted by and CSV holds; None where there is none.
        place: 1 for the best of its column, 2 for the second.
    """

    text: str
    value: float | str | None = None
    place: Literal[1, 2] | None = None


@dataclass(frozen=True)
class Grid:
    """A table of cells; the first cell of a row is its name.

    Args:
        header: The names of the columns.
        rows: The rows, each as long as the header.
        caption: What the cells are, in a sentence.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def markdown(self) -> str:
        """The table in Markdown, the best of a column in bold, and the caption below it."""
        raise NotImplementedError

    def latex(self) -> str:
        """The table in LaTeX with ``booktabs``, the best of a column in bold and the second underlined."""
        raise NotImplementedError

    def csv(self) -> str:
        """The table as CSV, with unrounded numbers."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows(["" if cell.value is None else cell.value for cell in row] for row in self.rows)
        return out.getvalue()
