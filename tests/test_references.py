"""Every name that a docstring refers to exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

from tests.test_architecture import modules

ROLE = re.compile(r":(?:mod|func|class|meth|attr):`~?([\w.]+)`")


def docstrings(tree: ast.Module) -> Iterator[tuple[list[str], str]]:
    """The path of the class that each text stands in, and the text; those of attributes, too."""

    def visit(node: ast.AST, path: list[str]) -> Iterator[tuple[list[str], str]]:
        for child in ast.iter_child_nodes(node):
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                yield path, child.value.value
            yield from visit(child, [*path, child.name] if isinstance(child, ast.ClassDef) else path)

    yield from visit(tree, [])


def exists(module: ModuleType, path: list[str], name: str) -> bool:
    """Whether a name means something: a module, a part of one, or a part of the class or module that refers to it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if parts[0] == "lightning_merge":
            try:
                return has(import_module(".".join(parts[:length])), parts[length:])
            except ImportError:
                continue
    owners = [module, *(found for i in range(len(path)) if (found := getattr(module, path[i], None)) is not None)]
    return any(has(owner, parts) for owner in owners)


def has(owner: object, names: list[str]) -> bool:
    for name in names:
        if not hasattr(owner, name) and name not in getattr(owner, "__dataclass_fields__", {}):
            return False
        owner = getattr(owner, name, None)
    return True


def test_what_docstrings_refer_to_exists():
    dangling = []
    for name, path in modules().items():
        module = import_module(name)
        for owner, text in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
            dangling += [f"{name}: {found}" for found in ROLE.findall(text) if not exists(module, owner, found)]
    assert not dangling, "\n".join(dangling)
