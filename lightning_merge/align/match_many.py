"""Several models at once into one common order, so that going around from model to model leads back to the start."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import reduce
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from lightning_merge.align.descent import Descent, compared, pairwise_inner_products
from lightning_merge.align.frank_wolfe import synchronize
from lightning_merge.align.permutation import Permutation
from lightning_merge.align.symmetries import Symmetries
from lightning_merge.align.weight_matching import checked, match_weights
from lightning_merge.utilities.errors import MergeError, raise_all

Name = TypeVar("Name", bound=Hashable)
Model = Mapping[str, Tensor]
Method = Literal["frank_wolfe", "mean", "reference"]
TOLERANCE = 1e-9  # of the similarity: smaller gains end the search


@overload
def match_many(
    models: Mapping[Name, Model], symmetries: Symmetries, *, method: Method = ..., seed: int = ..., sweeps: int = ...
) -> dict[Name, Permutation]: ...


@overload
def match_many(
    models: Sequence[Model], symmetries: Symmetries, *, method: Method = ..., seed: int = ..., sweeps: int = ...
) -> dict[int, Permutation]: ...


def match_many(
    models: Mapping[Any, Model] | Sequence[Model],
    symmetries: Symmetries,
    *,
    method: Method = "frank_wolfe",
    seed: int = 0,
    sweeps: int = 100,
) -> dict[Any, Permutation]:
    """Find a permutation for each of several models that brings all of them into the order of the first one.

    The order of model a relative to model b is ``result[a].then(result[b].inverse())``: it is the same whether one goes
    from a to b at once or by other models.

    Args:
        models: The parameters ``(…)`` of each model, by the model's name, or in a sequence, with the names 0, 1, 2, …
        symmetries: The groups of all models.
        method: ``frank_wolfe`` makes the similarity of all pairs large at once (C²M³, Crisostomi et al.: C²M³:
            Cycle-Consistent Multi-Model Merging, NeurIPS 2024), once from the models as they are and once from what
            ``reference`` finds, and keeps the better result. ``reference`` matches every model to the first one, and
            looks at no other pair. ``mean`` goes on from there: one model after the other, in random order, comes next
            to the mean of the others, as long as the similarity of all pairs grows (MergeMany, Git Re-Basin, appendix).
        seed: The seed of all random orders.
        sweeps: After how many visits of every group, and of every model, to stop at the latest.

    Returns:
        For every model its permutation; that of the first one moves nothing.

    Raises:
        MergeError: If there are fewer than two models, or if one has other parameters, shapes, or values that are not
            finite.
    """
    named = dict(models) if isinstance(models, Mapping) else dict(enumerate(models))
    if len(named) < 2:
        raise MergeError(f"There are {len(named)} models to match; give at least two.")
    raise_all([] if method in _METHODS else [f"method={method!r} must be one of {', '.join(_METHODS)}."])
    parameters = {name: checked(weights, symmetries, f"model {name}") for name, weights in named.items()}
    permutations = _METHODS[method](parameters, symmetries, torch.Generator().manual_seed(seed), sweeps)
    back = permutations[next(iter(named))].inverse()
    return {name: permutation.then(back) for name, permutation in permutations.items()}


def _to_the_first(
    models: Mapping[Name, Model], symmetries: Symmetries, generator: torch.Generator, sweeps: int
) -> dict[Name, Permutation]:
    first, *others = models
    seed = int(torch.randint(2**31, (), generator=generator))
    return {first: Permutation.identity(symmetries)} | {
        name: match_weights(models[first], models[name], symmetries, seed=seed, sweeps=sweeps) for name in others
    }


def _to_the_mean(
    models: Mapping[Name, Model], symmetries: Symmetries, generator: torch.Generator, sweeps: int
) -> dict[Name, Permutation]:
    """Match every model to the mean of the others until the similarity of all pairs no longer grows."""
    names, permutations = list(models), _to_the_first(models, symmetries, generator, sweeps)
    reached = pair_similarity([permutations[name].apply(models[name]) for name in names], symmetries)
    for _ in range(sweeps):
        for i in torch.randperm(len(names), generator=generator).tolist():
            name, others = names[i], [other for other in names if other != names[i]]
            permuted = [permutations[other].apply(models[other]) for other in others]
            mean = {
                key: reduce(torch.add, (model[key].double() for model in permuted)) / len(permuted)
                for key in models[name]
            }
            descent = Descent(mean, models[name], permutations[name])
            descent.run(generator, sweeps)
            permutations[name] = descent.permutation
        before = reached
        reached = pair_similarity([permutations[name].apply(models[name]) for name in names], symmetries)
        if reached - before <= TOLERANCE * abs(reached):
            break
    return permutations


def _by_frank_wolfe(
    models: Mapping[Name, Model], symmetries: Symmetries, generator: torch.Generator, sweeps: int
) -> dict[Name, Permutation]:
    """Start from the models as they are, as in the paper, and from what matching to the first one finds."""
    starts = [
        [Permutation.identity(symmetries)] * len(models),
        list(_to_the_first(models, symmetries, generator, sweeps).values()),
    ]
    return dict(zip(models, synchronize(list(models.values()), symmetries, starts), strict=True))


def pair_similarity(models: Sequence[Mapping[str, Tensor]], symmetries: Symmetries) -> float:
    """Compute the sum of the similarities of all pairs of models, in float64."""
    total = 0.0
    for name in compared(symmetries):
        total += pairwise_inner_products([model[name].double() for model in models])
    return total


_METHODS = {"frank_wolfe": _by_frank_wolfe, "mean": _to_the_mean, "reference": _to_the_first}
