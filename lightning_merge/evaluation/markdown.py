"""Tables in Markdown that are also readable as they are."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Lay out a table: the first column to the left, the others to the right, all padded to one width."""
    lines = [list(header), *([row[0].replace("|", "\\|"), *row[1:]] for row in body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def join(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *padded[1:]])} |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([join(lines[0]), rule, *map(join, lines[1:])])
