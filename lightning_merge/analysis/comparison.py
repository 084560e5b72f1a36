"""The comparison of experts: agreement, conflict and the effect of merging, parameter by parameter."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_merge.analysis import agreement
from lightning_merge.analysis.groups import GROUPS, grouped
from lightning_merge.analysis.records import GroupProfile, MatrixComparison, ParameterComparison
from lightning_merge.analysis.stored import from_plain, to_plain
from lightning_merge.utilities.errors import MergeError


@dataclass(frozen=True, repr=False)
class Comparison:
    """What :func:`lightning_merge.analysis.compare_experts` found.

    The functions take the names of the parameters to sum over; by default all.

    Args:
        experts: Their names, T of them.
        merged: The names of the merged models.
        parameters: Every parameter that the experts share.
        matrices: The matrices whose subspaces were compared.
        left_out: The names of matrices whose subspaces were not compared, to save time.
        rank_rule: How many singular vectors span a leading subspace, in words.
    """

    experts: Sequence[str]
    merged: Sequence[str]
    parameters: Sequence[ParameterComparison]
    matrices: Sequence[MatrixComparison]
    left_out: Sequence[str] = ()
    rank_rule: str = ""

    @cached_property
    def by_name(self) -> Mapping[str, ParameterComparison]:
        """What was found for each parameter."""
        return {parameter.name: parameter for parameter in self.parameters}

    def __repr__(self) -> str:
        return (
            f"Comparison({', '.join(self.experts)}; merged: {', '.join(self.merged) or 'none'}; "
            f"{len(self.parameters)} parameters, {len(self.matrices)} matrices)"
        )

    def products(self, names: Collection[str] | None = None) -> Tensor:
        """Return the inner products of the experts' task vectors ``(T, T)``."""
        zero = torch.zeros(len(self.experts), len(self.experts), dtype=torch.float64)
        return sum((parameter.products for parameter in self._of(names)), zero)

    def norms(self, names: Collection[str] | None = None) -> Tensor:
        """Return the norms of the experts' task vectors ``(T,)``."""
        return agreement.norms(self.products(names))

    def cosines(self, names: Collection[str] | None = None) -> Tensor:
        """Return the cosines between the experts' task vectors ``(T, T)``; NaN for a task vector of zeros."""
        return agreement.cosines(self.products(names))

    def mean_cosine(self, names: Collection[str] | None = None) -> float:
        """The mean cosine over the pairs of experts; NaN for a single one. Task vectors of zeros are left out."""
        return mean_of_pairs(self.cosines(names))

    def sign_conflict(self, names: Collection[str] | None = None) -> float:
        """The share of the entries changed by two experts or more that two change in different directions; or NaN."""
        found = list(self._of(names))
        moved = sum(parameter.moved for parameter in found)
        return sum(parameter.conflicts for parameter in found) / moved if moved else math.nan

    def chance_conflict(self) -> float:
        """What :meth:`sign_conflict` is where all T experts change entries in random directions, ``1 - 2^(1 - T)``."""
        return 1 - 2.0 ** (1 - len(self.experts))

    def distances(self, merged: str, names: Collection[str] | None = None) -> Tensor:
        """Return the distances of a merged model to the experts ``(T,)``."""
        return agreement.distances(
            self.products(names), self._square(merged, names), self._merged_products(merged, names)
        )

    def update_norm(self, merged: str, names: Collection[str] | None = None) -> float:
        """Return the norm of a merged model's update."""
        return math.sqrt(self._square(merged, names))

    def update_ratio(self, merged: str, names: Collection[str] | None = None) -> float:
        """The norm of a merged model's update, divided by the mean of the experts' norms; NaN if they are zero."""
        mean = float(self.norms(names).mean())
        return self.update_norm(merged, names) / mean if mean else math.nan

    def merged_cosines(self, merged: str, names: Collection[str] | None = None) -> Tensor:
        """Return the cosines between a merged model's update and every task vector ``(T,)``."""
        return self._merged_products(merged, names) / self.norms(names) / self.update_norm(merged, names)

    def mean_alignment(self) -> Tensor:
        """The mean over the matrices of ``alignment`` ``(T, T)``; where an expert's matrix is zero it is left out."""
        return self._mean([matrix.alignment for matrix in self.matrices])

    def chance_alignment(self) -> float:
        """The mean over the matrices of what ``alignment`` is for experts that have nothing to do with each other."""
        found = [chance for matrix in self.matrices if math.isfinite(chance := matrix.chance)]
        return sum(found) / len(found) if found else math.nan

    def mean_angles(self) -> Tensor:
        """Return the mean over the matrices of ``angles``, in radians ``(T, T)``; zero matrices are left out."""
        return self._mean([matrix.angles for matrix in self.matrices])

    def mean_merged_alignment(self, merged: str) -> Tensor:
        """Return the mean over the matrices of every expert's alignment with a merged model ``(T,)``."""
        return self._mean([matrix.merged_alignment[merged] for matrix in self.matrices], 1)

    def profile(self, pattern: str = GROUPS) -> dict[str, GroupProfile]:
        """What was found for every group of parameters, in the order of the model.

        Args:
            pattern: What this regular expression matches at the beginning of a parameter's name is its group; by
                default everything up to the first number, else the first part of the name.
        """
        return {
            group: GroupProfile(
                self.norms(names),
                self.mean_cosine(names),
                self.sign_conflict(names),
                {merged: self.update_ratio(merged, names) for merged in self.merged},
            )
            for group, names in grouped(self.by_name, pattern).items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, see :mod:`lightning_merge.analysis.stored`."""
        return to_plain(self.experts, self.merged, self.parameters, self.matrices, self.left_out, self.rank_rule)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Comparison:
        """Read what :meth:`to_dict` gave."""
        return cls(**from_plain(plain))

    def _of(self, names: Collection[str] | None) -> Iterable[ParameterComparison]:
        return self.parameters if names is None else (self.by_name[name] for name in names)

    def _square(self, merged: str, names: Collection[str] | None) -> float:
        if merged not in self.merged:
            raise MergeError(f"There is no merged model {merged!r}; there are {', '.join(self.merged) or 'none'}.")
        return math.fsum(parameter.merged_squares[merged] for parameter in self._of(names))

    def _merged_products(self, merged: str, names: Collection[str] | None) -> Tensor:
        zero = torch.zeros(len(self.experts), dtype=torch.float64)
        return sum((parameter.merged_products[merged] for parameter in self._of(names)), zero)

    def _mean(self, found: Sequence[Tensor], dimensions: int = 2) -> Tensor:
        nothing = torch.full((len(self.experts),) * dimensions, math.nan, dtype=torch.float64)
        return torch.stack([nothing, *found]).nanmean(dim=0)


def mean_of_pairs(values: Tensor) -> float:
    """Return the mean of what stands off the diagonal of ``(T, T)``, without NaN; NaN if nothing is left."""
    off_diagonal = ~torch.eye(len(values), dtype=torch.bool)
    return float(values[off_diagonal].nanmean())
