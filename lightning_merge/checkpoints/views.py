"""Weights that take from another model what they lack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_merge.checkpoints.prefixes import Prefix, find_prefix
from lightning_merge.checkpoints.weights import Weights
from lightning_merge.utilities.tensors import wide


class Completed(Weights):
    """One model's weights under exactly the names of another one, which gives what the first lacks.

    Files, digest and header are those of the first one. Names that share a tensor in the other model do so here.

    Args:
        weights: The first model.
        whole: The other one.
        kept: Names that the other one gives in any case.
    """

    def __init__(self, weights: Weights, whole: Weights, kept: Callable[[str], bool] = lambda name: False) -> None:
        self.__dict__.update(weights.__dict__)
        homes: dict[str, tuple[Weights, str]] = {}
        twins: dict[str, str] = {}  # of names that share a tensor, one that the first model has
        for name in whole:
            if name in weights:
                twins.setdefault(whole.tied.get(name, name), name)
        for name in whole:
            twin = name if name in weights else twins.get(whole.tied.get(name, name))
            homes[name] = (whole, name) if kept(name) or twin is None else (weights, twin)
        self._readers = {name: lambda home=home, old=old: home[old] for name, (home, old) in homes.items()}
        self.meta = {name: home.meta[old] for name, (home, old) in homes.items()}
        self.tied = {alias: owner for alias, owner in whole.tied.items() if homes[alias][0] is homes[owner][0]}
        self.original = weights

    def digest(self) -> str:
        """The first model's digest, by which its statistics know it."""
        return self.original.digest()


class Mean(Weights):
    """The mean of several models, computed when it is read. What is no floating point number is the first one's."""

    def __init__(self, name: str, models: Mapping[str, Weights]) -> None:
        first, *others = models.values()
        shared = {key for key in first if all(key in o and o.meta[key].shape == first.meta[key].shape for o in others)}

        def read(key: str) -> Tensor:
            if key not in shared or not first.meta[key].is_floating_point():
                return first[key]
            return mean_of(key, first, models)

        super().__init__(
            name,
            {key: lambda key=key: read(key) for key in first},
            first.meta,
            header=first.header,
            tied=first.tied,
            inputs=tuple(file for model in models.values() for file in model.inputs),
        )
        self.models = dict(models)

    def provenance(self) -> dict[str, Any]:
        """What the mean is of."""
        return {"mean_of": {name: model.provenance() for name, model in self.models.items()}}


def mean_of(name: str, base: Weights, experts: Mapping[str, Weights]) -> Tensor:
    """The mean of the experts' running statistics, in the dtype and on the device of the base."""
    own = base[name]
    copies = [wide(expert[name]).to(own.device) for expert in experts.values()]
    return torch.stack(copies).mean(dim=0).to(own)


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
