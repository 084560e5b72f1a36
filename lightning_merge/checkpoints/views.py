"""Views: one model's weights under other names, completed by another model's, or several models' mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_merge.checkpoints.prefixes import Prefix, find_prefix
from lightning_merge.checkpoints.weights import Weights
from lightning_merge.utilities.tensors import mean, wide


class View(Weights):
    """The weights of a model under other names; files, digest, and whatever else is known of it stay the model's.

    Args:
        original: The model.
        places: For every name of the view the model that has its tensor (the original, or another one that completes
            it), and the name there.
        tied: Names that share a tensor with another name: ``{alias: name}``.
    """

    def __init__(self, original: Weights, places: Mapping[str, tuple[Weights, str]], tied: Mapping[str, str]) -> None:
        super().__init__(
            original.name,
            readers={name: partial(model.__getitem__, old) for name, (model, old) in places.items()},
            meta={name: model.meta[old] for name, (model, old) in places.items()},
            path=original.path,
            header=original.header,
            tied=tied,
            inputs=original.inputs,
        )
        self.original, self.places = original, places
        self.origin, self.low_rank = original.origin, original.low_rank

    def provenance(self) -> dict[str, Any]:
        """Describe where the model is from."""
        return self.original.provenance()

    def digest(self) -> str:
        """Return the model's own digest, which its statistics name."""
        return self.original.digest()

    def delta(self, name: str, base: Tensor) -> Tensor | None:
        """Ask the model that has a parameter for its difference to a base's ``(…)``; None if it is not known."""
        model, old = self.places[name]
        return model.delta(old, base)

    def factors(self, name: str, base: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """Ask it for the factors ``(m, r)`` and ``(r, n)`` of the difference to a base's ``(…)``; None if not known."""
        model, old = self.places[name]
        return model.factors(old, base)


class Renamed(View):
    """A model under other names.

    Args:
        original: The model.
        names: ``{new: old}``, every name of it once.
        prefix: How the new names follow from the old ones.
    """

    def __init__(self, original: Weights, names: Mapping[str, str], prefix: Prefix) -> None:
        new_names = {old: new for new, old in names.items()}
        super().__init__(
            original,
            {new: (original, old) for new, old in names.items()},
            {new_names[alias]: new_names[owner] for alias, owner in original.tied.items()},
        )
        self.names, self.prefix = names, prefix
        if extra := original.header.get("extra_state"):
            self.header["extra_state"] = {prefix.applied(name): value for name, value in extra.items()}


class Completed(View):
    """A model under exactly the names of another one, which gives what the first lacks.

    Files, digest and header are those of the first one. Names that share a tensor in the other model do so here.

    Args:
        original: The first model.
        whole: The other one.
        kept: Tells which names the other one gives in any case.
    """

    def __init__(self, original: Weights, whole: Weights, kept: Callable[[str], bool] = lambda name: False) -> None:
        twins: dict[str, str] = {}  # of names that share a tensor, one that the first model has
        for name in whole:
            if name in original:
                twins.setdefault(whole.tied.get(name, name), name)
        places: dict[str, tuple[Weights, str]] = {}
        for name in whole:
            twin = name if name in original else twins.get(whole.tied.get(name, name))
            places[name] = (whole, name) if kept(name) or twin is None else (original, twin)
        tied = {alias: owner for alias, owner in whole.tied.items() if places[alias][0] is places[owner][0]}
        super().__init__(original, places, tied)


class Mean(Weights):
    """The mean of several models, computed when it is read. What is no floating point number is the first one's.

    Args:
        name: What to call the mean in messages.
        models: The models by name; the names of the mean are those of the first one.
    """

    def __init__(self, name: str, models: Mapping[str, Weights]) -> None:
        first, *others = models.values()
        averaged = {
            key
            for key, meta in first.meta.items()
            if meta.is_floating_point() and all(key in o and o.meta[key].shape == meta.shape for o in others)
        }
        super().__init__(
            name,
            {
                key: partial(mean_of, key, first, models) if key in averaged else partial(first.__getitem__, key)
                for key in first
            },
            first.meta,
            header=first.header,
            tied=first.tied,
            inputs=tuple(file for model in models.values() for file in model.inputs),
        )
        self.models = dict(models)

    def provenance(self) -> dict[str, Any]:
        """Describe where the averaged models are from."""
        return {"mean_of": {name: model.provenance() for name, model in self.models.items()}}


def mean_of(name: str, base: Weights, experts: Mapping[str, Weights]) -> Tensor:
    """Compute the mean ``(…)`` of a parameter of the experts, in the dtype and on the device of the base's.

    Args:
        name: The name of the parameter.
        base: The base, which gives dtype and device.
        experts: T experts by name.
    """
    like = base[name]
    copies = [wide(expert[name]).to(like.device) for expert in experts.values()]
    return mean(torch.stack(copies)).to(like)


def as_named(expert: Weights, base: Weights) -> Weights:
    """View an expert that has the base's own names under those of the base's view; names that the base lacks stay."""
    if not isinstance(base, Renamed):
        return expert
    new_names = {old: new for new, old in base.names.items()}
    return Renamed(expert, {new_names.get(name, name): name for name in expert}, base.prefix)


def own_names(base: Weights) -> Weights:
    """Return the base under its own names."""
    return base.original if isinstance(base, Renamed) else base


def match_names(base: Weights, expert: Weights) -> Weights:
    """View an expert under the base's names, if one prefix makes the difference; otherwise return it as it is.

    Names that the prefix does not stand before (a head next to a backbone) stay what they are.
    """
    prefix = find_prefix(base, expert)
    return expert if prefix is None else Renamed(expert, {prefix.applied(name): name for name in expert}, prefix)


def under_names_of(module: Weights, base: Weights) -> Weights:
    """View a base under the names of a module that was made from it, which may have more than the base (a head)."""
    matched = match_names(module, base)
    prefix = find_prefix(base, module) if matched is base else None
    if prefix is None:
        return matched
    inverse = Prefix(strip=prefix.add, add=prefix.strip)
    return Renamed(base, {inverse.applied(name): name for name in base}, inverse)


def rename_statistics(statistics: Weights, expert: Weights) -> Weights:
    """View the statistics of an expert (``kind.<parameter>``) under the names of the expert's view."""
    if not isinstance(expert, Renamed):
        return statistics
    new_names = {old: new for new, old in expert.names.items()}
    keys = {}
    for key in statistics:
        kind, dot, parameter = key.partition(".")
        keys[f"{kind}{dot}{new_names.get(parameter, parameter)}"] = key
    return Renamed(statistics, keys, expert.prefix)
