"""Weights that take from another model what they lack."""

from __future__ import annotations

from collections.abc import Callable

from lightning_merge.checkpoints import Weights


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
