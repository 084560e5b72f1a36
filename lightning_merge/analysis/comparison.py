"""The comparison of experts: agreement, conflict and the effect of merging, parameter by parameter."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_merge.analysis.agreement import distances
from lightning_merge.analysis.groups import GROUPS, grouped
from lightning_merge.analysis.records import GroupProfile, MatrixComparison, ParameterComparison
from lightning_merge.analysis.stored import from_plain, to_plain
from lightning_merge.merging.origins import Origins
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.inner_products import cosines, norms


@dataclass(frozen=True, repr=False)
class Comparison:
    """The result of :func:`lightning_merge.analysis.compare_experts`.

    The methods take the names of the parameters to sum over; by default all.

    Args:
        experts: The names of the experts, T of them.
        merged: The names of the merged models.
        parameters: The records of all parameters that the experts share.
        matrices: The records of the matrices whose subspaces were compared.
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
        """The record of each parameter, by its name."""
        return {parameter.name: parameter for parameter in self.parameters}

    def __repr__(self) -> str:
        return (
            f"Comparison({', '.join(self.experts)}; merged: {', '.join(self.merged) or 'none'}; "
            f"{len(self.parameters)} parameters, {len(self.matrices)} matrices)"
        )

    def products(self, names: Collection[str] | None = None) -> Tensor:
        """Sum up the inner products of the experts' task vectors ``(T, T)``."""
        zero = torch.zeros(len(self.experts), len(self.experts), dtype=torch.float64)
        return sum((parameter.products for parameter in self._of(names)), zero)

    def norms(self, names: Collection[str] | None = None) -> Tensor:
        """Compute the norms of the experts' task vectors ``(T,)``."""
        return norms(self.products(names))

    def cosines(self, names: Collection[str] | None = None) -> Tensor:
        """Compute the cosines between the experts' task vectors ``(T, T)``; NaN for a task vector of zeros."""
        return cosines(self.products(names))

    def origins(self) -> Origins:
        """Say how the experts lie to the base, from all matrices; of an older record nothing is known."""
        products = torch.zeros(1 + len(self.experts), 1 + len(self.experts), dtype=torch.float64)
        entries = 0
        for parameter in self.parameters:
            if len(parameter.shape) > 1 and parameter.base_square and parameter.base_products is not None:
                products[0, 0] += parameter.base_square
                products[0, 1:] += parameter.base_products
                products[1:, 1:] += parameter.products
                entries += math.prod(parameter.shape)
        products[1:, 0] = products[0, 1:]
        return Origins(self.experts, products, entries)

    def mean_cosine(self, names: Collection[str] | None = None) -> float:
        """Average the cosines of all pairs of experts; NaN for a single one. Task vectors of zeros are left out."""
        return mean_of_pairs(self.cosines(names))

    def sign_conflict(self, names: Collection[str] | None = None) -> float:
        """Compute the share of conflicting signs among entries that several experts change; NaN if there are none."""
        parameters = list(self._of(names))
        moved = sum(parameter.moved for parameter in parameters)
        return sum(parameter.conflicts for parameter in parameters) / moved if moved else math.nan

    def chance_conflict(self) -> float:
        """Compute :meth:`sign_conflict` for T experts that change entries in random directions, ``1 - 2^(1 - T)``."""
        return 1 - 2.0 ** (1 - len(self.experts))

    def distances(self, merged: str, names: Collection[str] | None = None) -> Tensor:
        """Compute the distances of a merged model to the experts ``(T,)``."""
        return distances(self.products(names), self._square(merged, names), self._merged_products(merged, names))

    def update_norm(self, merged: str, names: Collection[str] | None = None) -> float:
        """Compute the norm of a merged model's update."""
        return math.sqrt(self._square(merged, names))

    def update_ratio(self, merged: str, names: Collection[str] | None = None) -> float:
        """Divide the norm of a merged model's update by the mean of the experts' norms; NaN if they are zero."""
        mean = float(self.norms(names).mean())
        return self.update_norm(merged, names) / mean if mean else math.nan

    def merged_cosines(self, merged: str, names: Collection[str] | None = None) -> Tensor:
        """Compute the cosines between a merged model's update and every task vector ``(T,)``."""
        return self._merged_products(merged, names) / self.norms(names) / self.update_norm(merged, names)

    def mean_alignment(self) -> Tensor:
        """Average ``alignment`` over the matrices ``(T, T)``; where an expert's matrix is zero it is left out."""
        return self._mean([matrix.alignment for matrix in self.matrices])

    def chance_alignment(self) -> float:
        """Average over the matrices the ``alignment`` of experts that have nothing to do with each other."""
        chances = [chance for matrix in self.matrices if math.isfinite(chance := matrix.chance)]
        return sum(chances) / len(chances) if chances else math.nan

    def mean_angles(self) -> Tensor:
        """Average ``angles`` over the matrices, in radians ``(T, T)``; zero matrices are left out."""
        return self._mean([matrix.angles for matrix in self.matrices])

    def mean_merged_alignment(self, merged: str) -> Tensor:
        """Average every expert's alignment with a merged model over the matrices ``(T,)``."""
        return self._mean([matrix.merged_alignment[merged] for matrix in self.matrices], 1)

    def profile(self, pattern: str = GROUPS) -> dict[str, GroupProfile]:
        """Summarize every group of parameters, in the order of the model.

        Args:
            pattern: A regular expression, whose match at the beginning of a parameter's name is its group; by default
                everything up to the first number, else the first part of the name.
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
        """Convert the comparison to plain values that JSON can hold, see :mod:`lightning_merge.analysis.stored`."""
        return to_plain(self.experts, self.merged, self.parameters, self.matrices, self.left_out, self.rank_rule)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Comparison:
        """Read a comparison from what :meth:`to_dict` returned."""
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

    def _mean(self, tensors: Sequence[Tensor], dimensions: int = 2) -> Tensor:
        nothing = torch.full((len(self.experts),) * dimensions, math.nan, dtype=torch.float64)
        return torch.stack([nothing, *tensors]).nanmean(dim=0)


def mean_of_pairs(values: Tensor) -> float:
    """Average the entries off the diagonal of ``(T, T)``, without NaN; NaN if none are left."""
    off_diagonal = ~torch.eye(len(values), dtype=torch.bool)
    return float(values[off_diagonal].nanmean())
