"""The interface of a merging method: a frozen set of hyper-parameters and a rule on stacked task vectors."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_merge.methods.base.context import Context
from lightning_merge.methods.base.task_vectors import TaskVectors
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.tensors import mean
from lightning_merge.utilities.tiling import in_pieces, pieces


class Paper(NamedTuple):
    """The publication of a method.

    Args:
        authors: Such as ``Yadav et al.``
        venue: The conference or journal, or ``arXiv``.
        year: The year of the venue.
        arxiv: The arXiv number, if there is one.
    """

    authors: str
    venue: str
    year: int
    arxiv: str | None = None

    def __str__(self) -> str:
        return f"{self.authors}, {self.venue} {self.year}"


@dataclass(frozen=True)
class MergeMethod(ABC):
    """A merging method: a rule that turns the task vectors of T experts into one update of the base.

    The merged parameter is ``base + scale * update``. A subclass is a frozen dataclass whose fields are the paper's
    hyper-parameters under the paper's names; it overrides :meth:`matrix`, :meth:`tensor`, or both. A rule is a pure
    function: it never changes its inputs and does not depend on the order in which parameters come.

    Args:
        scale: Scaling coefficient of the update.
    """

    paper: ClassVar[Paper | None] = None
    """Where the method was published."""
    formula: ClassVar[str | None] = None
    """What it does, in a line: ``Δ_t`` is the task vector of expert t of T, ``τ`` the update, ``θ`` and ``W`` weights;
    products ``∘``, ``|·|`` and ``[·]``, 1 where a condition holds, are entry by entry. Of a matrix: ``σ`` its singular
    values, ``low_rank`` and ``polar`` its nearest matrix of a rank and its polar factor."""
    draws: ClassVar[bool] = False
    """Whether the method draws random numbers, which follow from the seed of the merge."""
    factorizes: ClassVar[bool] = False
    """Whether the method decomposes matrices, which is what costs most in a large model."""
    factorizations: ClassVar[tuple[int, int]] = (1, 1)
    """How many factorizations of a matrix a method that ``factorizes`` computes: so many for each expert, and so many
    besides. The time that a merge takes is estimated from it."""
    reads_twice: ClassVar[bool] = False
    """Whether the method looks at the whole model in :meth:`survey`, and so reads the experts again before it merges.
    A wrapper says it for its own survey; that of the method inside counts anyway."""
    dtype: ClassVar[torch.dtype] = torch.float32
    """The precision in which task vectors reach the rules; :mod:`lightning_merge.utilities.linalg` factorizes in
    float64."""
    entrywise: ClassVar[bool] = False
    """Whether every entry of the update depends on the survey and the task vectors' same entry only. Then the rules are
    given a parameter in pieces, ``(T, 1, n)`` if it counts as a matrix and ``(T, n)`` if not, and must leave alone
    ``context.base``, which is whole."""
    per_task: ClassVar[bool] = False
    """Whether the method keeps a model for each task, which ``merged.for_task(expert)`` gives."""
    order_matters: ClassVar[bool] = False
    """Whether the result may depend on the order of the experts (ties, or random draws, that go by position)."""
    min_experts: ClassVar[int] = 1
    """The fewest experts that the method can merge."""
    max_experts: ClassVar[int | None] = None
    """The most experts that the method can merge; None for any number."""
    needs: ClassVar[tuple[str, ...]] = ()
    """The statistics of the experts' data that the method needs, see
    :mod:`lightning_merge.checkpoints.statistics_files`."""
    needs_data: ClassVar[bool] = False
    """Whether the method runs the model on unlabelled data while it merges, see
    :class:`lightning_merge.methods.base.task_data.TaskData`."""

    _: KW_ONLY
    scale: float = 1.0

    def check_count(self, num_experts: int) -> None:
        """Raise a MergeError if the method cannot merge so many experts; asked before anything is read."""
        if self.max_experts is not None and num_experts > self.max_experts:
            raise MergeError(
                f"{type(self).__name__} merges at most {self.max_experts} experts, and {num_experts} are given."
            )
        if num_experts < self.min_experts:
            raise MergeError(
                f"{self!r} needs at least {self.min_experts} experts, and {num_experts} are given; give more, or "
                "change what asks for so many."
            )

    def survey(self, task_vectors: TaskVectors) -> Any:
        """Look once at the whole model before merging, for a statistic such as a global threshold.

        Args:
            task_vectors: The task vectors of every parameter; iterate as often as needed, one parameter at a time.

        Returns:
            Anything; the rules find it in ``context.survey``.
        """
        return None

    def matrix(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter that is a matrix: ``(T, m, n) -> (m, n)``. By default like any other tensor."""
        return self.tensor(deltas, context)

    def tensor(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter that is no matrix: ``(T, …) -> (…)``. By default the mean."""
        # Numbers that are large for float32 come in float64, and only there a sum may be too large.
        return mean(deltas) if deltas.dtype == torch.float64 else deltas.mean(dim=0)

    def update(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter, by the rule for matrices where it counts as one: ``(T, …) -> (…)``."""
        if not any(piece.any() for piece in pieces(deltas)):
            return torch.zeros_like(deltas[0])  # an update of zeros costs nothing
        return self.piecewise(lambda piece: self._by_rule(piece, context), deltas, context)

    def piecewise(self, rule: Callable[[Tensor], Tensor], deltas: Tensor, context: Context) -> Tensor:
        """Apply a rule ``(T, …) -> (…)`` to a parameter, in pieces that fit the cache if the method is entrywise."""
        if not self.entrywise:
            return rule(deltas)
        return in_pieces(rule, deltas, context.matrices.view(context.name, deltas.shape[1:]) is not None)

    def _by_rule(self, deltas: Tensor, context: Context) -> Tensor:
        blocks = context.matrices.blocks(context.name, deltas)
        if blocks is None:
            return self.tensor(deltas, context)
        return torch.cat([self.matrix(block, context) for block in blocks]).reshape(deltas.shape[1:])

    def task_update(self, deltas: Tensor, expert: int, context: Context) -> Tensor:
        """Merge a parameter for one expert's task: ``(T, …) -> (…)``. By default the same for all, :meth:`update`.

        Methods that keep a model for each task (masks, rescalers) override this and set ``per_task``.
        """
        return self.update(deltas, context)

    def nested(self) -> list[MergeMethod]:
        """List the method and the methods inside it, from the outside in."""
        inside = [getattr(self, argument.name) for argument in fields(self)]
        return [self, *(layer for value in inside if isinstance(value, MergeMethod) for layer in value.nested())]

    def describe(self) -> dict[str, Any]:
        """Describe the method by ``class_path`` and ``init_args``, as a config or a manifest does."""
        arguments = {argument.name: getattr(self, argument.name) for argument in fields(self)}
        arguments = {k: v.describe() if isinstance(v, MergeMethod) else v for k, v in arguments.items()}
        return {"class_path": type(self).__name__, "init_args": arguments}
