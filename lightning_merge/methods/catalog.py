"""``lightning-merge methods``: every method with its paper, what it needs, and its defaults."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from lightning_merge import methods
from lightning_merge.methods.base import MergeMethod
from lightning_merge.methods.base.wrapper import Wrapper
from lightning_merge.utilities.grid import Cell, Grid, as_markdown

_HEADER = ("method", "paper", "year", "needs", "defaults")


def list_methods() -> list[dict[str, Any]]:
    """Describe every method of :mod:`lightning_merge.methods`, by the year of its paper and its name.

    Returns:
        For each the name of its class under ``method``, ``paper``, ``arxiv``, ``year``, a list of what it ``needs``
        besides the experts' weights, and its arguments under ``defaults``.
    """
    classes = [getattr(methods, name) for name in methods.__all__]
    exported = [cls() for cls in classes if issubclass(cls, MergeMethod) and cls not in (MergeMethod, Wrapper)]
    rows = []
    for method in exported:
        paper = method.paper
        rows.append(
            {
                "method": type(method).__name__,
                "paper": f"{paper.authors}, {paper.venue}" if paper else None,
                "arxiv": paper.arxiv if paper else None,
                "year": paper.year if paper else None,
                "needs": list(_needs(method)),
                "defaults": method.describe()["init_args"],
            }
        )
    return sorted(rows, key=lambda row: (row["year"] or 0, row["method"]))


def _needs(method: MergeMethod) -> Iterator[str]:
    """Yield what a method and the methods inside it need, or do besides adding up weights."""
    yield from (f"data ({kind})" for kind in method.needs)
    if method.needs_data:
        yield "data (the model is run on images)"
    if any(layer.factorizes for layer in method.nested()):
        yield "factorized matrices"
    if any(layer.draws for layer in method.nested()):
        yield "random numbers"
    if method.per_task:
        yield "a model per task"
    if method.min_experts > 1:
        yield f"at least {method.min_experts} experts"
    if method.max_experts is not None:
        yield f"at most {method.max_experts} experts"


def name_problem(name: str) -> str | None:
    """Say that no merging method has a name, and which one is like it; None if there is one.

    Args:
        name: As it is typed; what is no single word (an import path, YAML) is left to the parser.
    """
    known = {kind.__name__ for kind in _kinds(MergeMethod)}
    if name in known or not name.isidentifier() or name == "null":
        return None
    plain = {one.lower(): one for one in sorted(known)}
    sought = name.replace("_", "").lower()
    like = [one for one in plain if sought.startswith(one)] or get_close_matches(sought, plain, 1)
    hint = f"do you mean {' or '.join(plain[one] for one in like)}? " if like else ""
    return f"There is no merging method {name!r}; {hint}`lightning-merge methods` lists them."


def _kinds(kind: type[MergeMethod]) -> Iterator[type[MergeMethod]]:
    """Yield all classes that extend one, those of a project, too."""
    for one in kind.__subclasses__():
        yield one
        yield from _kinds(one)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Format the methods as a Markdown table, whose papers are links."""

    def cells(row: dict[str, Any]) -> list[Cell]:
        paper, year, call = row["paper"] or "", row["year"], _arguments(row["defaults"])
        link = f"[{as_markdown(paper)}](https://arxiv.org/abs/{row['arxiv']})" if row["arxiv"] else None
        return [
            Cell(row["method"], markdown=f"`{row['method']}`"),
            Cell(paper, markdown=link),
            Cell(str(year or ""), year),
            Cell(", ".join(row["needs"])),
            Cell(call, markdown=f"`{call}`"),
        ]

    return "\n".join(Grid(_HEADER, [cells(row) for row in rows]).markdown_lines(ragged=True))


def _arguments(arguments: dict[str, Any]) -> str:
    """Format arguments as Python does; a method inside is given with those that differ from its own defaults."""

    def text(value: Any) -> str:
        if not isinstance(value, dict):
            return repr(value)
        defaults = getattr(methods, value["class_path"])().describe()["init_args"]
        changed = {name: argument for name, argument in value["init_args"].items() if argument != defaults[name]}
        return f"{value['class_path']}({_arguments(changed)})"

    return ", ".join(f"{name}={text(value)}" for name, value in arguments.items())


def main(args: list[str]) -> None:
    """Print the methods, as ``lightning-merge methods [--json]`` does."""
    parser = argparse.ArgumentParser("lightning-merge methods", description="List every merging method.")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a Markdown table")
    rows = list_methods()
    text = json.dumps(rows, indent=2) if parser.parse_args(args).json else markdown(rows)
    sys.stdout.write(f"{text}\n")
