"""Experts whose names differ from the base's by what stands before them, as one module's do inside another.

A LightningModule that keeps its network as ``self.model`` saves ``model.blocks.0.weight`` where the library that the
network is from has ``blocks.0.weight``. Which prefix that is follows from the names and shapes of the two models; no
prefix is known here by name. (What ``torch.compile`` puts into names is taken out where files are read.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_merge.checkpoints.names import is_of_one_kind
from lightning_merge.checkpoints.weights import Weights

_ENOUGH = 0.9
"""The share of the base's parameters that a prefix must find in an expert, with their shapes."""


@dataclass(frozen=True)
class Prefix:
    """A change of prefix by which an expert's names become the base's.

    Args:
        strip: What stands before the expert's names, with its dot; empty if nothing does.
        add: What stands before the base's.
    """

    strip: str
    add: str

    def applied(self, name: str) -> str:
        """Translate the name of an expert's parameter to the base's; keep it if the prefix does not stand before it."""
        return self.add + name.removeprefix(self.strip) if name.startswith(self.strip) else name

    def __str__(self) -> str:
        return f"{self.strip}* -> {self.add}*"


def find_prefix(base: Weights, expert: Weights) -> Prefix | None:
    """Find the one prefix by which nearly all of the base's parameters are found in an expert, with their shapes.

    Returns:
        None if the expert has the base's names already, if no prefix does it, or if several would (a student and a
        teacher in one file).
    """
    names = [name for name in base if name not in base.tied]
    if is_of_one_kind(list(base), expert):
        return None
    needed = _ENOUGH * len(names)
    candidates = {
        _shortened(strip, add) for strip in _leading(expert, needed) for add in _leading(names, needed) if strip != add
    }
    fitting = [prefix for prefix in candidates if _count_matches(base, names, expert, prefix) >= needed]
    if len(fitting) != 1 or len({fitting[0].applied(name) for name in expert}) < len(expert):
        return None
    return fitting[0]


def _leading(names: Iterable[str], needed: float) -> list[str]:
    """List what stands before at least so many names: nothing, ``model.``, ``model.blocks.``."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts.update(".".join(parts[:depth]) + "." for depth in range(1, len(parts)))
    return ["", *(prefix for prefix, count in counts.items() if count >= needed)]


def _shortened(strip: str, add: str) -> Prefix:
    """Drop what both have in common at their ends: of ``model.blocks.`` and ``blocks.`` only ``model.`` is left."""
    old, new = strip.split(".")[:-1], add.split(".")[:-1]
    while old and new and old[-1] == new[-1]:
        old.pop()
        new.pop()
    return Prefix("".join(f"{part}." for part in old), "".join(f"{part}." for part in new))


def _count_matches(base: Weights, names: Iterable[str], expert: Weights, prefix: Prefix) -> int:
    matched = 0
    for name in names:
        old = prefix.strip + name.removeprefix(prefix.add)
        if name.startswith(prefix.add) and old in expert:
            matched += base.meta[name].shape == expert.meta[old].shape
    return matched
