"""Methods that change what another method sees, or what it returns."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base.context import Context
from lightning_merge.methods.base.method import MergeMethod
from lightning_merge.methods.base.task_vectors import TaskVectors


@dataclass(frozen=True)
class Wrapper(MergeMethod):
    """A method around another one. By default it changes nothing.

    A subclass overrides :meth:`transform`, to change the task vectors that the inner method surveys and merges, or
    :meth:`update`, to change what the inner method returns.

    The default is no default of the field, because a command line would hand its arguments on to whatever method
    replaces it; it is ``default_method``.

    Args:
        method: The method inside.
        scale: Scaling coefficient of the update; by default that of the method inside, whose own is not used further.
    """

    default_method: ClassVar[MergeMethod | None] = None
    """The method inside, where none is given."""

    method: MergeMethod | None = None
    _: KW_ONLY
    scale: float | None = None  # type: ignore[assignment]  # a float after __post_init__

    def __post_init__(self) -> None:
        if self.method is None:
            if self.default_method is None:
                raise ValueError(f"{type(self).__name__} needs a method to wrap.")
            object.__setattr__(self, "method", self.default_method)
        if self.scale is None:
            object.__setattr__(self, "scale", self.inside.scale)

    @property
    def inside(self) -> MergeMethod:
        """The method inside."""
        assert self.method is not None
        return self.method

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # that of the method inside
        """The precision of the method inside."""
        return self.inside.dtype

    @property
    def per_task(self) -> bool:  # type: ignore[override]  # that of the method inside
        """Whether the method inside keeps a model for each task."""
        return self.inside.per_task

    @property
    def order_matters(self) -> bool:  # type: ignore[override]  # that of the method inside
        """Whether the method inside depends on the order of the experts."""
        return self.inside.order_matters

    @property
    def min_experts(self) -> int:  # type: ignore[override]  # that of the method inside
        """The fewest experts that the method inside can merge."""
        return self.inside.min_experts

    @property
    def max_experts(self) -> int | None:  # type: ignore[override]  # that of the method inside
        """The most experts that the method inside can merge."""
        return self.inside.max_experts

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # that of the method inside
        """The statistics that the method inside needs."""
        return self.inside.needs

    @property
    def needs_data(self) -> bool:  # type: ignore[override]  # that of the method inside
        """Whether the method inside runs the model on data."""
        return self.inside.needs_data

    def check_count(self, num_experts: int) -> None:
        """Raise a MergeError if this method, or the one inside, cannot merge so many experts."""
        super().check_count(num_experts)
        self.inside.check_count(num_experts)

    def transform(self, deltas: Tensor, context: Context) -> Tensor:
        """Change the task tensors of one parameter: ``(T, …) -> (T, …)``. Must depend on the parameter only."""
        return deltas

    def survey(self, task_vectors: TaskVectors) -> Any:
        """Let the method inside survey the transformed task vectors."""
        return self.inside.survey(task_vectors.map(self.transform))

    def update(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter by the method inside: ``(T, …) -> (…)``."""
        return self.inside.update(self.transform(deltas, context), context)

    def task_update(self, deltas: Tensor, expert: int, context: Context) -> Tensor:
        """Merge a parameter by the method inside for one expert's task: ``(T, …) -> (…)``."""
        return self.inside.task_update(self.transform(deltas, context), expert, context)
