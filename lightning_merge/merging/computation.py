"""A merging method applied to models, parameter by parameter, by several workers at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_merge.checkpoints import Weights
from lightning_merge.checkpoints.joined import take_apart
from lightning_merge.checkpoints.views import mean_of
from lightning_merge.checkpoints.weights import widest
from lightning_merge.merging.inventory import Inventory
from lightning_merge.methods import MergeMethod
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.tensors import Scratch, is_finite, largest_magnitude
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
        allow_non_finite: Whether the inputs were not looked at and may hold NaN or infinity.
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
    allow_non_finite: bool = False
    scratch: Scratch = field(default_factory=Scratch, repr=False)

    def parameter(self, name: str) -> Tensor:
        """Compute a parameter or buffer ``(…)`` of the model: ``base + scale * update``, a mean, or the base's own.

        Raises:
            NonFiniteError: If finite inputs give NaN or infinity, or numbers that the base's dtype does not hold.
        """
        if name in self.inventory.averaged:
            mean = mean_of(name, self.base, self.experts)
            return self._checked(name, mean, mean)
        if name in self.inventory.copied:
            return self.base[name].clone()
        if name in self.inventory.magnitudes:
            return take_apart(self._merged(self.inventory.magnitudes[name], self._update), self.base.meta[name])[0]
        merged = self._merged(name, self._update)
        g = self._magnitude_of(name)
        return merged if g is None else take_apart(merged, self.base.meta[g])[1]

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
        return self._with_aliases(self.parameters([*self.inventory.merged, *self.inventory.magnitudes]))

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
        for g, v in self.inventory.magnitudes.items():
            merged[g], merged[v] = take_apart(merged[v], self.base.meta[g])
        return self._with_aliases(merged)

    def _magnitude_of(self, name: str) -> str | None:
        """Find the magnitude whose direction a parameter is; None of any other."""
        return next((g for g, v in self.inventory.magnitudes.items() if v == name), None)

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
        with in_sentences(self.method, repr(name)):
            change = update(lambda: self.task_vectors.stack(name, base, scratch), context)
        merged = torch.add(context.base, change, alpha=self.method.scale)
        return self._checked(name, merged.to(base), merged)

    def _checked(self, name: str, rounded: Tensor, exact: Tensor) -> Tensor:
        """Return a parameter ``(…)`` unless it is not finite where it should be, in the base's dtype or before."""
        if is_finite(rounded):
            return rounded
        base = self.base[name]
        odd = ~rounded.isfinite() & ~base.isinf()  # a mask stays infinite
        if not odd.any() or (self.allow_non_finite and not all(map(is_finite, self._inputs(name)))):
            return rounded
        largest = largest_magnitude(exact.masked_select(odd.to(exact.device)))
        what = f"{name!r}, merged by {type(self.method).__name__},"
        if math.isfinite(largest):
            wider = "float32" if base.dtype.itemsize < 4 else "float64"
            raise NonFiniteError(
                f"{what} reaches {largest:.3g}, and {base.dtype}, the base's type, ends at "
                f"{torch.finfo(base.dtype).max:.3g}; give the base in {wider}, or a smaller scale than "
                f"{self.method.scale:g}, or keep the base's with exclude: [{name}]."
            )
        precise = "" if exact.dtype == torch.float64 else "compute with merge(…, dtype=torch.float64), or "
        raise NonFiniteError(
            f"{what} is not finite in {int(odd.sum())} of {odd.numel()} entries, though all inputs are; {precise}give "
            f"another method, or keep the base's with exclude: [{name}]."
        )

    def _inputs(self, name: str) -> Iterator[Tensor]:
        """Read everything that goes into a parameter, and then, since a survey looks at the whole, into the others."""
        for other in (name, *self.inventory.merged):
            yield from (model[other] for model in (self.base, *self.experts.values()))
            if other in self.inventory.merged:
                yield from self.task_vectors.context(other).statistics.values()


def precision_of(method: MergeMethod, base: Weights, experts: Iterable[Weights]) -> torch.dtype:
    """Choose the precision of the task vectors: the method's own, or float64 where weights or differences have it."""
    exact = method.factorizes and any(expert.low_rank for expert in experts)  # they keep their low rank
    return torch.promote_types(method.dtype, torch.float64 if exact else widest(base))


class NonFiniteError(MergeError):
    """An error about merged values that are not finite though the inputs are."""


@contextmanager
def in_sentences(method: MergeMethod, what: str = "a matrix") -> Iterator[None]:
    """Say in a sentence that LAPACK has failed within the block.

    Raises:
        MergeError: If it has.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise MergeError(
            f"{type(method).__name__} cannot factorize {what}: its values are not finite, or too far apart; give "
            "another method, or leave such parameters to the base with exclude."
        ) from error
