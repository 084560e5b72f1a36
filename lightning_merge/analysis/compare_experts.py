"""Compare experts with each other and with what was merged of them, reading one parameter at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from lightning_merge.analysis.agreement import inner_products, sign_conflicts
from lightning_merge.analysis.alignment import OF_PAIRS, RankRule
from lightning_merge.analysis.choosing import choose, operations
from lightning_merge.analysis.comparison import Comparison
from lightning_merge.analysis.expert_matrices import ExpertMatrices, MergedMatrix
from lightning_merge.analysis.groups import by_depth, grouped
from lightning_merge.analysis.records import MatrixComparison, ParameterComparison
from lightning_merge.checkpoints import Experts, Source, Weights, open_experts, open_weights
from lightning_merge.checkpoints.weights import widest
from lightning_merge.merging.inventory import take_inventory
from lightning_merge.merging.merged import Merged
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.tensors import Scratch, is_finite
from lightning_merge.utilities.workers import count_workers, run_each


def compare_experts(
    base: Source,
    experts: Experts,
    merged: Source | Experts | Merged | Mapping[str, Merged] | None = None,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    matrices: Matrices | None = None,
    workers: int | None = None,
    subspaces: bool = True,
    every_matrix: bool = False,
    threshold: float | None = None,
    error: float | None = None,
    off_by_one: bool = False,
) -> Comparison:
    """Find where experts agree and fight, and what merging did to them.

    Norms, cosines, distances and sign conflicts are found for every parameter. Singular values, subspace alignment,
    principal angles and SCORE's map take much longer: they are found for as many matrices as a fixed amount of
    arithmetic allows (:data:`~lightning_merge.analysis.choosing.BUDGET`), evenly over depth and kinds of layers. Which
    they are depends on the models' shapes and numbers alone; all matrices of a small model are among them. A matrix
    that no expert has changed is not looked at.

    Files are read parameter by parameter. Each worker holds one parameter of every expert in memory, and of one merged
    model at a time. Heads that experts keep to themselves are excluded as in a merge.

    Args:
        base: The model that the experts started from.
        experts: The experts: a sequence of sources, or a mapping from a name to a source; adapters and task vectors are
            experts, too.
        merged: Merged models: a mapping from a name to a source (or to what :func:`lightning_merge.merge` returned), a
            sequence of files, or one.
        include: Look only at the parameters whose name matches one of these shell patterns.
        exclude: Do not look at those that match one of these.
        matrices: Which parameters count as matrices.
        workers: Parameters that are looked at at the same time; by default one for each core, at most eight.
        subspaces: Whether to look at subspaces at all.
        every_matrix: Look at the subspaces of all matrices, however long it takes.
        threshold: The leading subspace of a task matrix keeps more than this share of its norm; by default 0.97, as in
            SCORE's code.
        error: The leading subspace leaves out at most this share of the norm, instead.
        off_by_one: One vector less than the threshold needs, as the official codes take.

    Returns:
        What was found.

    Raises:
        MergeError: If the models do not fit together, cannot be read, or hold values that are not finite.
    """
    if workers is not None and workers < 1:
        raise MergeError(f"workers must be at least 1, got {workers}.")
    by_default = threshold is None and error is None
    rule = RankRule(error, OF_PAIRS.threshold if by_default else threshold, off_by_one)
    origin = open_weights(base, name="base")
    sources = open_experts(experts, origin)
    inventory = take_inventory(origin, list(sources.values()), include, exclude)
    names = by_depth(inventory.merged)
    results = _open_merged(merged, origin, names)
    models = _Models(origin, sources, results, names, matrices or Matrices())
    workers = count_workers(workers, origin[names[0]].device, sum(origin.meta[name].numel() for name in names))
    parameters = models.parameters(workers)
    costs = models.costs([parameter.name for parameter in parameters if bool(parameter.products.any())])
    chosen = list(costs) if every_matrix else choose(costs)
    found = models.matrices(chosen if subspaces else [], costs, rule, workers)
    for weights in (origin, *sources.values(), *results.values()):
        weights.check_unchanged()
    left_out = [name for name in costs if name not in chosen or not subspaces]
    return Comparison(list(sources), list(results), parameters, found, left_out, str(rule))


class _Models:
    """A base, T experts and merged models, of which one parameter at a time is read by each worker."""

    def __init__(
        self,
        base: Weights,
        experts: Mapping[str, Weights],
        merged: Mapping[str, Weights],
        names: Sequence[str],
        rule: Matrices,
    ) -> None:
        self._base = base
        self._names = names
        self._rule = rule
        self._labels = [f"the expert {name}" for name in experts]
        self._experts = ExpertTaskVectors(base, list(experts.values()), names, widest(base), matrices=rule)
        self._merged = {
            name: ExpertTaskVectors(base, [weights], names, widest(base), matrices=rule)
            for name, weights in merged.items()
        }
        self._scratch, self._scratch_of_merged = Scratch(), Scratch()

    def parameters(self, workers: int) -> list[ParameterComparison]:
        """Compare every parameter.

        Raises:
            MergeError: If one holds values that are not finite; every one is listed.
        """
        found: dict[str, ParameterComparison] = {}
        problems: dict[str, list[str]] = {}

        def one(name: str) -> None:
            found[name], problems[name] = self._parameter(name)

        self._each(one, self._names, workers)
        raise_all([problem for name in self._names for problem in problems[name]])
        return [found[name] for name in self._names]

    def matrices(
        self, names: Sequence[str], costs: Mapping[str, float], rule: RankRule, workers: int
    ) -> list[MatrixComparison]:
        """Compare the subspaces of matrices, those that take longest first."""
        found: dict[str, list[MatrixComparison]] = {}

        def one(name: str) -> None:
            found[name] = self._matrices(name, rule)

        self._each(one, sorted(names, key=lambda name: -costs[name]), workers)
        return [matrix for name in names for matrix in found[name]]

    def costs(self, names: Sequence[str]) -> dict[str, float]:
        """What it takes to compare the subspaces of those parameters that are matrices."""
        views = {name: self._rule.view(name, self._base.meta[name].shape) for name in names}
        return {
            name: operations(*view, self._experts.num_experts, len(self._merged))
            for name, view in views.items()
            if view
        }

    def _each(self, work: Callable[[str], None], names: Sequence[str], workers: int) -> None:
        run_each(work, names, workers)
        self._scratch.forget()
        self._scratch_of_merged.forget()

    def _updates(self, name: str, own: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the updates of the merged models ``(1, …)``, one after another in the same memory."""
        for merged, task_vectors in self._merged.items():
            yield merged, task_vectors.stack(name, own, self._scratch_of_merged)

    def _parameter(self, name: str) -> tuple[ParameterComparison, list[str]]:
        own = self._base[name]
        deltas = self._experts.stack(name, own, self._scratch)
        found = ParameterComparison(
            name, tuple(own.shape), inner_products(deltas).cpu(), *sign_conflicts(deltas), {}, {}
        )
        squares = dict(zip(self._labels, found.products.diagonal().tolist(), strict=True))
        for merged, update in self._updates(name, own):
            square = float(inner_products(update))
            found.merged_squares[merged], squares[f"the merged model {merged}"] = square, square
            found.merged_products[merged] = inner_products(deltas, update).squeeze(1).cpu()
        bad = [label for label, square in squares.items() if not math.isfinite(square)]
        if bad and not is_finite(own):
            bad = ["the base"]
        return found, [
            f"{name!r} of {label} holds values that are not finite; was its training diverging? Give another "
            f"checkpoint, or leave the parameter out with exclude: [{name}]."
            for label in bad
        ]

    def _matrices(self, name: str, rule: RankRule) -> list[MatrixComparison]:
        own = self._base[name]
        blocks = self._rule.blocks(name, self._experts.stack(name, own, self._scratch))
        names = [name] if len(blocks) == 1 else [f"{name}[{i}]" for i in range(len(blocks))]
        found = [ExpertMatrices(block, rule) for block in blocks]
        merged: list[dict[str, MergedMatrix]] = [{} for _ in blocks]
        for result, update in self._updates(name, own):
            for matrices, own_merged, block in zip(found, merged, self._rule.blocks(name, update), strict=True):
                own_merged[result] = matrices.compare_merged(block[0])
        return [matrices.record(*parts) for matrices, *parts in zip(found, names, merged, strict=True)]


def _open_merged(
    merged: Source | Experts | Merged | Mapping[str, Merged] | None, base: Weights, names: Sequence[str]
) -> dict[str, Weights]:
    """Open merged models, and see that they have the parameters that are compared."""
    if merged is None or (isinstance(merged, (Mapping, Sequence)) and not merged):
        return {}
    is_one = isinstance(merged, (str, os.PathLike, Weights)) or (
        isinstance(merged, Mapping) and any(isinstance(value, Tensor) for value in merged.values())
    )
    if isinstance(merged, Merged):
        merged, is_one = merged.weights, True
    if isinstance(merged, Mapping):
        merged = {name: own.weights if isinstance(own, Merged) else own for name, own in merged.items()}
    found = open_experts({"merged": merged} if is_one else merged, base)
    raise_all(
        [
            f"The merged model {name} has none of the {len(names)} parameters that the experts share; give one "
            "that was merged of them."
            for name, weights in found.items()
            if not any(key in weights for key in names)
        ]
    )
    raise_all(
        [
            f"The merged model {name} lacks {key!r}, which the experts share; give a model that was merged of them, or "
            f"leave it out with exclude: [{key}]."
            if key not in weights
            else f"{key!r} has shape {tuple(weights.meta[key].shape)} in the merged model {name} and "
            f"{tuple(base.meta[key].shape)} in the base; give a model that was merged of these experts."
            for name, weights in found.items()
            for key in names
            if key not in weights or weights.meta[key].shape != base.meta[key].shape
        ]
    )
    return found


def update_ratios(
    base: Source, experts: Mapping[str, Source], merged: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """How far merged models move each group of layers: their update's norm, divided by the mean of the experts'.

    Merged models that hold values that are not finite, and groups that no expert has moved, are left out.
    """
    whole = {name: weights for name, weights in merged.items() if all(map(is_finite, weights.values()))}
    comparison = compare_experts(base, experts, whole, subspaces=False)
    groups = grouped(comparison.by_name)
    ratios = {name: {group: comparison.update_ratio(name, own) for group, own in groups.items()} for name in whole}
    return {name: {g: ratio for g, ratio in own.items() if math.isfinite(ratio)} for name, own in ratios.items()}
