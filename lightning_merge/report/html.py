"""A page as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_merge.checkpoints import write_text
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.report.page import Listing, Page, Picture
from lightning_merge.utilities.grid import Cell, Grid

if TYPE_CHECKING:
    from markupsafe import Markup

_SCRIPTS = ("sortable.min.js", "page.js")


def write_page(page: Page, path: str | Path, *, data: Mapping[str, Any] | None = None) -> Path:
    """Write a page into one HTML file, completely or not at all.

    Args:
        page: The content.
        path: The file; its folder is made if it is missing.
        data: Numbers behind the page, which a reader can save as JSON; what is not finite becomes null.

    Returns:
        The file.
    """
    path = local_path(path)
    text = render(page, data=data)
    write_text(path, text)
    return path


def render(page: Page, *, data: Mapping[str, Any] | None = None) -> str:
    """Render a page as HTML with its styles, script, figures and data inside; the same page gives the same text.

    Every name and every sentence is escaped. The page's own policy forbids the browser to load anything and to run any
    script but the page's own.

    Args:
        page: The content.
        data: Numbers behind the page, which a reader can save as JSON; what is not finite becomes null.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("lightning_merge.report", "assets"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.tests |= {"grid": _is(Grid), "picture": _is(Picture), "listing": _is(Listing)}
    environment.filters |= {"svg": _svg, "copies": _copies, "columns": _columns, "sort_key": _sort_key}
    environment.policies["json.dumps_kwargs"] = {}
    script = "\n".join(_asset(name) for name in _SCRIPTS)
    text = environment.get_template("page.html.jinja").render(
        page=page,
        style=Markup(_asset("page.css")),
        script=Markup(script),
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        data=None if data is None else _finite(data),
    )
    return text.encode(errors="backslashreplace").decode()  # half of a surrogate pair in a file's name is no UTF-8


def _asset(name: str) -> str:
    """Read a file that is part of every page."""
    return files("lightning_merge.report").joinpath("assets", name).read_text(encoding="utf-8")


def _is(kind: type) -> Callable[[object], bool]:
    """Make a test for the template."""
    return lambda part: isinstance(part, kind)


def _columns(grid: Grid) -> list[str]:
    """Name the type of every column: ``number`` where there are numbers and no other values, else ``text``."""
    columns = [[row[i].value for row in grid.rows if row[i].value is not None] for i in range(len(grid.header))]
    return ["text" if not values or any(isinstance(value, str) for value in values) else "number" for values in columns]


def _sort_key(cell: Cell, column: str) -> str:
    """Make the key that the browser sorts a cell by: "" stands last in both directions, numbers compare as such."""
    if column == "text":
        text = cell.text if cell.value is None else str(cell.value)
        return text and f"x{text}"  # so that a name which is a number, too, is compared as text
    if cell.value is None or math.isnan(number := float(cell.value)):
        return ""
    return repr(number).replace("inf", "Infinity")


def _copies(grid: Grid) -> dict[str, dict[str, list[str]]]:
    """Write the table in each format as lines: those before the rows, one for each row, and those after them."""
    markdown, latex = grid.markdown().split("\n"), grid.latex().split("\n")
    header = replace(grid, rows=[]).csv()
    return {
        "Markdown": _lines(markdown, before=2, rows=len(grid.rows)),
        "CSV": {
            "before": [header.removesuffix("\n")],
            "rows": [replace(grid, rows=[row]).csv().removeprefix(header).removesuffix("\n") for row in grid.rows],
            "after": [""],
        },
        "LaTeX": _lines(latex, before=latex.index(r"    \midrule") + 1, rows=len(grid.rows)),
    }


def _lines(lines: list[str], *, before: int, rows: int) -> dict[str, list[str]]:
    return {"before": lines[:before], "rows": lines[before : before + rows], "after": lines[before + rows :]}


def _svg(picture: Picture, prefix: str) -> Markup:
    """Write a figure as an SVG element, whose text can be selected, and whose ids begin with a prefix."""
    from markupsafe import Markup

    from lightning_merge.report.svg import svg

    return Markup(svg(picture.figure, picture.title, prefix))


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not know, by None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
