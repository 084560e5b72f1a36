"""Groups of parameters: the blocks of a model, by the names of its parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lightning_merge.utilities.errors import MergeError

GROUPS = r".*?\.\d+(?=\.)|[^.]+"
"""Everything up to the first number (``backbone.blocks.3``), else the first part of a name."""


def group_of(name: str, pattern: str = GROUPS) -> str:
    """Find a parameter's group: what a regular expression matches at the beginning of its name, else ``other``."""
    match = re.match(pattern, name)
    return match[0] if match and match[0] else "other"


def grouped(names: Iterable[str], pattern: str = GROUPS) -> dict[str, list[str]]:
    """Collect the names of each group, in their order.

    Raises:
        MergeError: If the pattern is no regular expression.
    """
    check_pattern(pattern)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(group_of(name, pattern), []).append(name)
    return groups


def by_depth(names: Iterable[str]) -> list[str]:
    """Sort names in the order of the blocks: files may have ``blocks.10`` before ``blocks.2``.

    The numbers in names count as numbers; what stands between them stays in the order of its first appearance.
    """
    first: dict[str, int] = {}

    def key(name: str) -> list[tuple[bool, int]]:
        place, parts = "", []
        for part in name.split("."):
            number = part.isdecimal()
            place += ".*" if number else f".{part}"
            parts.append((number, int(part) if number else first.setdefault(place, len(first))))
        return parts

    return sorted(names, key=key)


def check_pattern(pattern: str) -> None:
    """Raise a :class:`MergeError` if a pattern is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise MergeError(f"groups {pattern!r} is no regular expression: {error}.") from error
