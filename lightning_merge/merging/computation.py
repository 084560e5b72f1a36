"""A merging method applied to models, parameter by parameter, by several workers at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_merge.checkpoints import Weights
from lightning_merge.checkpoints.views import mean_of
from lightning_merge.merging.inventory import Inventory
from lightning_merge.methods import MergeMethod
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors
from lightning_merge.utilities.tensors import Scratch
from lightning_merge.utilities.workers import run_each


@dataclass(frozen=True)
class Computation:
    """A method applied to task vectors, parameter by parameter.

    Args:
        method: The method.
        base: The base.
        experts: The experts by name.
        task_vectors: The task vectors of every merged parameter.
        survey: The result of the method's look at the whole model.
        inventory: What happens to every parameter.
        workers: Parameters that are computed at the same time.
        updates: Where the updates are kept once they are computed; None to forget them.
        scratch: Where the task vectors of a parameter stand while it is merged.
    """

    method: MergeMethod
    base: Weights
    experts: Mapping[str, Weights]
    task_vectors: ExpertTaskVectors
    survey: Any
    inventory: Inventory
    workers: int = 1
    updates: dict[str, Tensor] | None = None
    scratch: Scratch = field(default_factory=Scratch, repr=False)

    def parameter(self, name: str) -> Tensor:
        """Compute a parameter or buffer ``(…)`` of the model: ``base + scale * update``, a mean, or the base's own."""
        if name in self.inventory.averaged:
            return mean_of(name, self.base, self.experts)
        if name in self.inventory.copied:
            return self.base[name].clone()
        return self._merged(name, self._update)

    def parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Compute several parameters or buffers ``(…)``, held in memory, in the order of the names."""
        computed: dict[str, Tensor] = {}
        self.each(names, computed.__setitem__)
        return {name: computed[name] for name in names}

    def each(self, names: Sequence[str], use: Callable[[str, Tensor], None]) -> None:
        """Compute parameters ``(…)`` and hand each to ``use(name, parameter)``, in any order; none is kept."""

        def one(name: str) -> None:
            use(name, self.parameter(name))

        run_each(one, names, self.workers, "merging", self.cost)
        self.scratch.forget()

    def all_merged(self) -> dict[str, Tensor]:
        """Compute the parameters ``(…)`` that the method merges."""
        return self._with_aliases(self.parameters(self.inventory.merged))

    def for_task(self, expert: int) -> dict[str, Tensor]:
        """Compute the parameters ``(…)`` that the method merges for one expert's task; none if tasks do not differ."""
        if not self.method.per_task:
            return {}
        merged: dict[str, Tensor] = {}

        def one(name: str) -> None:
            merged[name] = self._merged(
                name, lambda deltas, context: self.method.task_update(deltas(), expert, context)
            )

        run_each(one, self.inventory.merged, self.workers, "merging", self.cost)
        self.scratch.forget()
        return self._with_aliases(merged)

    def _with_aliases(self, merged: dict[str, Tensor]) -> dict[str, Tensor]:
        return merged | {alias: merged[owner] for alias, owner in self.inventory.tied.items() if owner in merged}

    def rescaled(self, scale: float) -> Computation:
        """Return the same computation with another scaling coefficient."""
        return replace(self, method=replace(self.method, scale=scale))

    def cost(self, name: str) -> float:
        """Estimate a parameter's cost in relation to the others: ``m n min(m, n)`` for a matrix that is factorized."""
        shape = self.base.meta[name].shape
        view = self.task_vectors.matrices.view(name, shape) if self.method.factorizes else None
        if view is None or name not in self.inventory.merged:
            return float(shape.numel())
        blocks, m, n = view
        return float(blocks * m * n * (min(m, n) + 1))

    def _update(self, deltas: Callable[[], Tensor], context: Any) -> Tensor:
        if self.updates is None:
            return self.method.update(deltas(), context)
        if context.name not in self.updates:
            self.updates[context.name] = self.method.update(deltas(), context)
        return self.updates[context.name]

    def _merged(self, name: str, update: Callable[[Callable[[], Tensor], Any], Tensor]) -> Tensor:
        base = self.base[name]
        context = self.task_vectors.context(name, self.survey, base)
        scratch = self.scratch if self.updates is None else None  # an update that is kept may be a part of them
        change = update(lambda: self.task_vectors.stack(name, base, scratch), context)
        return torch.add(context.base, change, alpha=self.method.scale).to(base)
