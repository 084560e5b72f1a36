"""Experts whose names differ from the base's by what stands before them, as one module's do inside another.

A LightningModule that keeps its network as ``self.model`` saves ``model.blocks.0.weight`` where the library that the
network is from has ``blocks.0.weight``. Which prefix that is follows from the names and shapes of the two models; no
prefix is known here by name. (What ``torch.compile`` puts into names is taken out where files are read.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_merge.checkpoints import Weights
from lightning_merge.inventory import is_of_one_kind

_ENOUGH = 0.9
"""The share of the base's parameters that a prefix must find in an expert, with their shapes."""


@dataclass(frozen=True)
class Prefix:
    """How an expert's names become the base's.

    Args:
        strip: What stands before the expert's names, with its dot; empty if nothing does.
        add: What stands before the base's.
    """

    strip: str
    add: str

    def applied(self, name: str) -> str:
        """The name that a parameter of the expert has in the base; its own if the prefix does not stand before it."""
        return self.add + name.removeprefix(self.strip) if name.startswith(self.strip) else name

    def __str__(self) -> str:
        return f"{self.strip}* -> {self.add}*"


class Renamed(Weights):
    """A model under other names. Its files, its digest and whatever else is known of it are the model's own.

    Args:
        original: The model.
        names: ``{new: old}``, every name of it once.
        prefix: How the new names follow from the old ones.
    """

    def __init__(self, original: Weights, names: Mapping[str, str], prefix: Prefix) -> None:
        self.__dict__.update(original.__dict__)
        new = {old: name for name, old in names.items()}
        self._readers = {name: lambda old=old: original[old] for name, old in names.items()}
        self.meta = {name: original.meta[old] for name, old in names.items()}
        self.tied = {new[alias]: new[owner] for alias, owner in original.tied.items()}
        self.original, self.names, self.prefix = original, names, prefix

    def digest(self) -> str:
        """The model's own digest, by which its statistics know it."""
        return self.original.digest()

    def delta(self, name: str, base: Tensor) -> Tensor | None:
        """What the model knows of a parameter's difference to a base."""
        return self.original.delta(self.names[name], base)

    def factors(self, name: str, base: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """The factors of that difference."""
        return self.original.factors(self.names[name], base)


def as_named(expert: Weights, base: Weights) -> Weights:
    """See an expert that has the base's own names as the base is seen; names that the base lacks stay what they are."""
    if not isinstance(base, Renamed):
        return expert
    names = {old: new for new, old in base.names.items()}
    return Renamed(expert, {names.get(name, name): name for name in expert}, base.prefix)


def own_names(base: Weights) -> Weights:
    """The base under its own names."""
    return base.original if isinstance(base, Renamed) else base


def match_names(base: Weights, expert: Weights) -> Weights:
    """See an expert under the base's names, if one prefix makes the difference; else give it back as it is.

    Names that the prefix does not stand before (a head beside a backbone) stay what they are.
    """
    prefix = find_prefix(base, expert)
    return expert if prefix is None else Renamed(expert, {prefix.applied(name): name for name in expert}, prefix)


def under_names_of(module: Weights, base: Weights) -> Weights:
    """See a base under the names of a module that was made from it, which may have more than the base (a head)."""
    matched = match_names(module, base)
    prefix = find_prefix(base, module) if matched is base else None
    if prefix is None:
        return matched
    inverse = Prefix(strip=prefix.add, add=prefix.strip)
    return Renamed(base, {inverse.applied(name): name for name in base}, inverse)


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
    """What stands before at least so many names: nothing, ``model.``, ``model.blocks.``."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts.update(".".join(parts[:depth]) + "." for depth in range(1, len(parts)))
    return ["", *(prefix for prefix, count in counts.items() if count >= needed)]


def _shortened(strip: str, add: str) -> Prefix:
    """The same prefix without what both have in common at their ends: ``model.blocks.`` and ``blocks.``: ``model.``."""
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


def rename_statistics(statistics: Weights, expert: Weights) -> Weights:
    """See the statistics of an expert (``kind.<parameter>``) under the names under which the expert is seen."""
    if not isinstance(expert, Renamed):
        return statistics
    new = {old: name for name, old in expert.names.items()}
    keys = {}
    for key in statistics:
        kind, dot, parameter = key.partition(".")
        keys[f"{kind}{dot}{new.get(parameter, parameter)}"] = key
    return Renamed(statistics, keys, expert.prefix)
