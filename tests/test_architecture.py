"""The order of the package: every import points downward, and no two files import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from tests.conftest import ROOT

ROOMS = (
    "utilities", "checkpoints", "align", "repair", "methods", "merging", "testing", "analysis",  # torch alone
    "models", "data", "evaluation", "report", "callbacks", "trainer",  # Lightning
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module by its dotted name; ``callbacks/`` is ``lightning_merge.callbacks``."""
    found = {}
    for top, prefix in (("lightning_merge", ()), ("callbacks", ("lightning_merge",))):
        for path in (ROOT / top).rglob("*.py"):
            parts = [*prefix, *path.relative_to(ROOT).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """What a file imports of the package, also within functions and for type checkers only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}, line {node.lineno}: import by the whole name, so that the order can be seen")
        if isinstance(node, ast.ImportFrom) and node.module in known:
            yield from (
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def graph() -> dict[str, set[str]]:
    known = modules()
    root = "lightning_merge"  # its version and its lazy names are not a floor
    return {name: set(imports(path, known)) - {name, root} for name, path in known.items() if name != root}


def test_every_import_points_downward():
    height = {room: i for i, room in enumerate(ROOMS)}
    upward = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if (mine := name.split(".")[1]) in height and height[mine] < height[other.split(".")[1]]
    ]
    assert not upward, "\n".join(sorted(upward))


def test_no_file_stands_in_a_circle():
    TopologicalSorter(graph()).prepare()  # raises graphlib.CycleError, which names the circle


def test_every_module_stands_in_a_room():
    loose = [name for name in modules() if name.count(".") and name.split(".")[1] not in (*ROOMS, "__main__")]
    assert not loose


def test_no_file_is_too_long():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert not [name for name, count in lines.items() if count > 300 and name != "lightning_merge.testing"]
