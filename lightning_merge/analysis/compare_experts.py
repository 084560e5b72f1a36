"""Compare experts with each other and with what was merged of them, reading one parameter at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

from torch import Tensor

from lightning_merge.analysis.agreement import sign_conflicts
from lightning_merge.analysis.alignment import OF_PAIRS, RankRule
from lightning_merge.analysis.choosing import choose, operations
from lightning_merge.analysis.comparison import Comparison
from lightning_merge.analysis.expert_matrices import ExpertMatrices, MergedMatrix
from lightning_merge.analysis.groups import by_depth, grouped
from lightning_merge.analysis.records import MatrixComparison, ParameterComparison
from lightning_merge.checkpoints import Experts, Source, Weights, open_experts, open_weights
from lightning_merge.checkpoints.joined import join
from lightning_merge.checkpoints.weights import widest
from lightning_merge.merging.inventory import take_inventory
from lightning_merge.merging.merged import Merged
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.inner_products import inner_products
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
    """Find where experts agree and where they conflict, and what merging did to them.

    Norms, cosines, distances and sign conflicts are computed for every parameter. Singular values, subspace alignment,
    principal angles and SCORE's map take much longer: they are computed for as many matrices as a fixed amount of
    arithmetic allows (:data:`~lightning_merge.analysis.choosing.BUDGET`), evenly over depth and kinds of layers. The
    choice depends on the models' shapes and numbers alone; of a small model all matrices are chosen. Matrices that no
    expert has changed are skipped.

    Files are read parameter by parameter. Each worker holds one parameter of every expert in memory, and of one merged
    model at a time. Heads that experts keep to themselves are excluded as in a merge.

    Args:
        base: The model that the experts started from.
        experts: The experts: a sequence of sources, or a mapping from a name to a source; adapters and task vectors are
            experts, too.
        merged: Merged models: a mapping from a name to a source (or to what :func:`lightning_merge.merge` returned), a
            sequence of files, or one.
        include: Compare only the parameters whose name matches one of these shell patterns.
        exclude: Do not compare those whose name matches one of these.
        matrices: Which parameters count as matrices.
        workers: The number of parameters compared at the same time; by default one for each core, at most eight.
        subspaces: Whether to compare subspaces at all.
        every_matrix: Compare the subspaces of all matrices, however long it takes.
        threshold: The leading subspace of a task matrix keeps more than this share of its norm; by default 0.97, as in
            SCORE's code.
        error: The leading subspace leaves out at most this share of the norm, instead.
        off_by_one: Take one vector less than the threshold needs, as the official codes do.

    Returns:
        The comparison.

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
    results = join(origin, _open_merged(merged, origin, names), inventory.magnitudes)[1]
    origin, sources = join(origin, sources, inventory.magnitudes)
    models = _Models(origin, sources, results, names, matrices or Matrices())
    workers = count_workers(workers, origin[names[0]].device, sum(origin.meta[name].numel() for name in names))
    parameters = models.parameters(workers)
    costs = models.costs([parameter.name for parameter in parameters if bool(parameter.products.any())])
    chosen = list(costs) if every_matrix else choose(costs)
    matrix_records = models.matrices(chosen if subspaces else [], costs, rule, workers)
    for weights in (origin, *sources.values(), *results.values()):
        weights.check_unchanged()
    left_out = [name for name in costs if name not in chosen or not subspaces]
    return Comparison(list(sources), list(results), parameters, matrix_records, left_out, str(rule))


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
        records: dict[str, ParameterComparison] = {}
        problems: dict[str, list[str]] = {}

        def compare(name: str) -> None:
            records[name], problems[name] = self._parameter(name)

        self._each(compare, self._names, workers)
        raise_all([problem for name in self._names for problem in problems[name]])
        return [records[name] for name in self._names]

    def matrices(
        self, names: Sequence[str], costs: Mapping[str, float], rule: RankRule, workers: int
    ) -> list[MatrixComparison]:
        """Compare the subspaces of matrices, those that take longest first."""
        records: dict[str, list[MatrixComparison]] = {}

        def compare(name: str) -> None:
            records[name] = self._matrices(name, rule)

        self._each(compare, sorted(names, key=lambda name: -costs[name]), workers)
        return [matrix for name in names for matrix in records[name]]

    def costs(self, names: Sequence[str]) -> dict[str, float]:
        """Estimate the floating-point operations of comparing subspaces, for each parameter that is a matrix."""
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

    def _updates(self, name: str, base: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the updates of the merged models ``(1, …)``, one after another in the same memory."""
        for merged, task_vectors in self._merged.items():
            yield merged, task_vectors.stack(name, base, self._scratch_of_merged)

    def _blocks(self, name: str, stack: Tensor) -> tuple[Tensor, ...]:
        """Split the stacked differences ``(T, …)`` of a parameter that is a matrix into task matrices ``(T, m, n)``."""
        blocks = self._rule.blocks(name, stack)
        assert blocks is not None  # only parameters that `costs` lists come here
        return blocks

    def _parameter(self, name: str) -> tuple[ParameterComparison, list[str]]:
        base = self._base[name]
        deltas = self._experts.stack(name, base, self._scratch)
        products, (moved, conflicts) = inner_products(deltas).cpu(), sign_conflicts(deltas)
        own = base[None].to(deltas)
        squares = dict(zip(self._labels, products.diagonal().tolist(), strict=True))
        merged_squares: dict[str, float] = {}
        merged_products: dict[str, Tensor] = {}
        for merged, update in self._updates(name, base):
            merged_squares[merged] = squares[f"the merged model {merged}"] = float(inner_products(update))
            merged_products[merged] = inner_products(deltas, update).squeeze(1).cpu()
        record = ParameterComparison(
            name,
            tuple(base.shape),
            products,
            moved,
            conflicts,
            merged_squares,
            merged_products,
            float(inner_products(own)),
            inner_products(own, deltas)[0].cpu(),
        )
        bad = [label for label, square in squares.items() if not math.isfinite(square)]
        if bad and not is_finite(base):
            bad = ["the base"]
        return record, [
            f"{name!r} of {label} holds values that are not finite; was its training diverging? Give another "
            f"checkpoint, or leave the parameter out with exclude: [{name}]."
            for label in bad
        ]

    def _matrices(self, name: str, rule: RankRule) -> list[MatrixComparison]:
        base = self._base[name]
        blocks = self._blocks(name, self._experts.stack(name, base, self._scratch))
        names = [name] if len(blocks) == 1 else [f"{name}[{i}]" for i in range(len(blocks))]
        by_block = [ExpertMatrices(block, rule) for block in blocks]
        merged: list[dict[str, MergedMatrix]] = [{} for _ in blocks]
        for model, update in self._updates(name, base):
            for matrices, by_model, block in zip(by_block, merged, self._blocks(name, update), strict=True):
                by_model[model] = matrices.compare_merged(block[0])
        return [
            matrices.record(block_name, by_model)
            for matrices, block_name, by_model in zip(by_block, names, merged, strict=True)
        ]


def _open_merged(
    merged: Source | Experts | Merged | Mapping[str, Merged] | None, base: Weights, names: Sequence[str]
) -> dict[str, Weights]:
    """Open merged models, and check that they have the parameters that are compared."""
    if merged is None or (isinstance(merged, (Mapping, Sequence)) and not merged):
        return {}
    models = open_experts(_merged_sources(merged), base)
    raise_all(
        [
            f"The merged model {name} has none of the {len(names)} parameters that the experts share; give one "
            "that was merged of them."
            for name, weights in models.items()
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
            for name, weights in models.items()
            for key in names
            if key not in weights or weights.meta[key].shape != base.meta[key].shape
        ]
    )
    return models


def _merged_sources(merged: Source | Experts | Merged | Mapping[str, Merged]) -> Experts:
    """Collect the sources of merged models, as those of experts are given; a single model is called ``merged``."""
    if isinstance(merged, Merged):
        return {"merged": dict(merged.weights)}
    if isinstance(merged, (str, os.PathLike)):
        return {"merged": merged}
    if not isinstance(merged, Mapping):
        return merged
    entries = {name: entry.weights if isinstance(entry, Merged) else entry for name, entry in merged.items()}
    if isinstance(merged, Weights) or any(isinstance(entry, Tensor) for entry in entries.values()):
        return {"merged": cast(dict[str, Tensor], entries)}
    return cast(dict[str, Source], entries)


def update_ratios(
    base: Source, experts: Mapping[str, Source], merged: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """Compute how far merged models move each group of layers: the update's norm, divided by the experts' mean norm.

    Merged models that hold values that are not finite, and groups that no expert has moved, are left out.
    """
    tensors = {name: open_weights(weights, name) for name, weights in merged.items()}
    finite = {name: weights for name, weights in tensors.items() if all(map(is_finite, weights.values()))}
    comparison = compare_experts(base, experts, finite, subspaces=False)
    groups = grouped(comparison.by_name)
    ratios = {name: {group: comparison.update_ratio(name, keys) for group, keys in groups.items()} for name in finite}
    return {
        name: {g: ratio for g, ratio in by_group.items() if math.isfinite(ratio)} for name, by_group in ratios.items()
    }
