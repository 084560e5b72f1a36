"""The activations of experts that were recorded beside their checkpoints, for TACT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lightning_merge.align.axes import sources
from lightning_merge.align.foundations import Permuted
from lightning_merge.align.permutation import Permutation
from lightning_merge.checkpoints import Weights, open_weights, statistics_file
from lightning_merge.checkpoints.statistics_files import command, foreign_problems
from lightning_merge.checkpoints.views import Renamed
from lightning_merge.repair.moments import Moments, from_tensors
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.sites import Site

_KINDS = ("moments",)


def moments_file(expert: Weights) -> Path | None:
    """Name the file of an expert's moments, whether it exists or not; None for an expert in memory."""
    while isinstance(expert, Permuted):
        expert = expert.original
    return statistics_file(expert)


def read_moments(expert: Weights, name: str) -> dict[Site, Moments]:
    """Read the moments ``(channels,)`` of an expert's activations on its own data, by site, from its statistics file.

    Those of an expert whose channels were put into another order are put into that order, too.

    Args:
        expert: The expert.
        name: What to call it in messages.

    Raises:
        MergeError: If there are none, if they are of other weights, or if it cannot be told how channels were moved.
    """
    if isinstance(expert, Permuted):
        return _permuted(read_moments(expert.original, name), expert.permutation, name)
    path, how = statistics_file(expert), f"make them with `{command(expert, _KINDS)}`"
    if path is None or not path.is_file():
        raise MergeError(f"The activations of expert {name} were not recorded beside its file; {how}.")
    statistics = open_weights(path)
    raise_all(foreign_problems(statistics, expert, name, _KINDS))
    try:
        moments = from_tensors(statistics)
    except (KeyError, ValueError) as error:
        raise MergeError(f"{statistics.name} is not complete: {error.args[0]}; {how}.") from error
    if not moments:
        raise MergeError(f"{statistics.name} holds no moments of activations, mean.<site>; {how}.")
    if not isinstance(expert, Renamed):
        return moments
    return {replace(site, path=expert.prefix.applied(site.path)): of_site for site, of_site in moments.items()}


def _permuted(moments: Mapping[Site, Moments], permutation: Permutation, name: str) -> dict[Site, Moments]:
    groups, permuted = permutation.symmetries, {}
    for site, of_site in moments.items():
        if permutation.moved() and site.name not in groups.features:
            raise MergeError(
                f"It cannot be told how the alignment moved the channels of expert {name} at {site.name!r}; leave "
                "repair.recorded out, so that the expert is run on its images."
            )
        axes = groups.features.get(site.name)
        order = sources(axes[site.axis], permutation.orders, groups.within) if axes else slice(None)
        permuted[site] = Moments.known(of_site.count, of_site.mean[order], of_site.variance[order])
    return permuted
