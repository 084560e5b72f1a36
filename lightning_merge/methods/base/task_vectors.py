"""Task vectors: the differences ``expert - base``, computed one parameter at a time."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_merge.checkpoints import Weights
from lightning_merge.methods.base.context import Context
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.methods.base.statistics import ParameterStatistics
from lightning_merge.methods.base.task_data import TaskData
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.tensors import Scratch, is_finite, wide, without_masks

Transform = Callable[[Tensor, Context], Tensor]
"""A change of the task tensors of one parameter: ``(T, …) -> (T, …)``."""


class TaskVectors(ABC):
    """The task vectors of T experts as a method sees them, computed when they are asked for.

    Args:
        names: The parameters.
        matrices: Which parameters count as matrices.
        seed: What every parameter's own seed is derived from.
    """

    def __init__(self, names: Iterable[str], matrices: Matrices, seed: int) -> None:
        self._names = tuple(names)
        self.matrices = matrices
        self.seed = seed

    @property
    @abstractmethod
    def num_experts(self) -> int:
        """The number of experts, T."""

    @property
    def tasks(self) -> TaskData:
        """The experts' module and the data of their tasks, for methods that need them.

        Raises:
            MergeError: If there are none, or if these task vectors are no differences of the module's parameters.
        """
        raise MergeError(
            "A method that runs the model cannot merge in other coordinates than the parameters' own; use it by "
            "itself and not inside KnOTS or CoreSpace."
        )

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor:
        """Compute the task tensors of one parameter: ``(T, …)``."""

    @abstractmethod
    def shape(self, name: str) -> torch.Size:
        """Return the shape ``(…)`` of a parameter in one model, without reading it."""

    @abstractmethod
    def context(self, name: str, survey: Any = None) -> Context:
        """Build the context of a parameter for a method's rule."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter's name and task tensors ``(T, …)``, one at a time."""
        for name in self:
            yield name, self[name]

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the same as :meth:`items`, for one look at each: a tensor may be overwritten when the next is read."""
        return self.items()

    def numel(self, name: str) -> int:
        """Count the entries of a parameter in one model, without reading it."""
        return self.shape(name).numel()

    def is_matrix(self, name: str) -> bool:
        """Tell whether a parameter counts as a matrix (or as several), without reading it."""
        return self.matrices.view(name, self.shape(name)) is not None

    def factors(self, name: str) -> list[tuple[Tensor, Tensor]] | None:
        """Find the LoRA factors ``B (m, r)`` and ``A (r, n)`` that span the experts' changes of a parameter.

        Returns:
            Those of all experts; None if they are not known.
        """
        return None

    def map(self, transform: Transform) -> TaskVectors:
        """Transform the task vectors as they are read."""
        return Transformed(self, transform)

    def seed_of(self, name: str) -> int:
        """Derive the seed of one parameter."""
        return zlib.crc32(f"{self.seed}/{name}".encode())


class Transformed(TaskVectors):
    """Task vectors seen through a transformation, as a wrapper shows them to the method inside.

    Args:
        source: The task vectors.
        transform: What is done to the task tensors ``(T, …)`` of a parameter before anyone sees them.
    """

    def __init__(self, source: TaskVectors, transform: Transform) -> None:
        super().__init__(source, source.matrices, source.seed)
        self._source = source
        self._transform = transform

    @property
    def num_experts(self) -> int:
        """The number of experts, T."""
        return self._source.num_experts

    @property
    def tasks(self) -> TaskData:
        """The experts' module and the data of their tasks, which stay what they are."""
        return self._source.tasks

    def __getitem__(self, name: str) -> Tensor:
        """Compute the transformed task tensors of one parameter: ``(T, …)``."""
        return self._transform(self._source[name], self.context(name))

    def shape(self, name: str) -> torch.Size:
        """Return the shape ``(…)`` of a parameter, which no transformation changes."""
        return self._source.shape(name)

    def context(self, name: str, survey: Any = None) -> Context:
        """Build the context of a parameter for a method's rule."""
        return self._source.context(name, survey)

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the same as :meth:`items`, for one look at each: a tensor may be overwritten when the next is read."""
        for name, deltas in self._source.stream():
            yield name, self._transform(deltas, self.context(name))

    def map(self, transform: Transform) -> TaskVectors:
        """Add one more transformation; both are given the same context, since to build one reads the base."""
        return Transformed(self._source, lambda deltas, context: transform(self._transform(deltas, context), context))


class ExpertTaskVectors(TaskVectors):
    """The differences ``expert - base`` of every merged parameter.

    Args:
        base: The base.
        experts: T experts.
        names: The merged parameters.
        dtype: What the differences are converted to; they are taken in float32 (float64 if the weights are).
        device: Where they are put; by default where the weights are.
        matrices: Which parameters count as matrices.
        seed: What every parameter's own seed is derived from.
        statistics: What each expert's data say about its parameters, in the order of the experts; or nothing.
        infinite: The parameters that are infinite in places; by default the base is looked at when it is read. Where an
            expert is infinite as the base is (an attention mask), the difference is zero.
        tasks: The experts' module and the data of their tasks; or nothing.
    """

    def __init__(
        self,
        base: Weights,
        experts: Sequence[Weights],
        names: Iterable[str],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        matrices: Matrices = Matrices(),  # noqa: B008, a frozen dataclass
        seed: int = 0,
        statistics: Sequence[Weights] = (),
        tasks: TaskData | None = None,
        infinite: Container[str] | None = None,
    ) -> None:
        super().__init__(names, matrices, seed)
        self._base = base
        self._experts = experts
        self._dtype = dtype
        self._device = device
        self._statistics = statistics
        self._tasks = tasks
        self._infinite = infinite

    @property
    def num_experts(self) -> int:
        """The number of experts, T."""
        return len(self._experts)

    @property
    def tasks(self) -> TaskData:
        """The experts' module and the data of their tasks, for methods that need them."""
        return super().tasks if self._tasks is None else self._tasks

    def __getitem__(self, name: str) -> Tensor:
        """Compute the stacked differences of one parameter: ``(T, …)``."""
        return self.stack(name, self._base[name])

    def stack(self, name: str, base: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Compute the stacked differences of one parameter, whose base was read already: ``(T, …)``.

        Args:
            name: The name of the parameter.
            base: The base's parameter ``(…)``.
            scratch: Memory in which they stand until it is used again; by default they get memory of their own.
        """
        base = wide(base).to(self._device)
        empty = torch.empty if scratch is None else scratch.empty
        deltas = empty((self.num_experts, *base.shape), dtype=self._dtype, device=base.device)
        infinite = not is_finite(base) if self._infinite is None else name in self._infinite
        for expert, delta in zip(self._experts, deltas, strict=True):
            _subtract(expert, name, base, delta, infinite)
        return deltas

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the same as :meth:`items`, for one look at each: a tensor is overwritten when the next is asked for."""
        scratch = Scratch()
        for name in self:
            yield name, self.stack(name, self._base[name], scratch)

    def shape(self, name: str) -> torch.Size:
        """Return the shape ``(…)`` of a parameter, without reading it."""
        return self._base.meta[name].shape

    def factors(self, name: str) -> list[tuple[Tensor, Tensor]] | None:
        """Find the LoRA factors ``B (m, r)`` and ``A (r, n)`` of a parameter of all experts; None if one has none."""
        base = wide(self._base[name])
        factors: list[tuple[Tensor, Tensor]] = []
        for expert in self._experts:
            pairs = expert.factors(name, base)
            if pairs is None:
                return None
            factors += pairs
        return factors

    def context(self, name: str, survey: Any = None, base: Tensor | None = None) -> Context:
        """Build the context of a parameter for a method's rule.

        Args:
            name: The name of the parameter.
            survey: What the method found in its look at the whole model.
            base: The base's parameter ``(…)``, if it was read already.
        """
        base = wide(self._base[name] if base is None else base).to(self._device, self._dtype)
        statistics = ParameterStatistics(name, self._statistics, base)
        return Context(name, base, self.matrices, self.seed_of(name), survey, statistics)


def _subtract(expert: Weights, name: str, base: Tensor, delta: Tensor, infinite: bool) -> None:
    """Write the difference of an expert's parameter to the base's ``(…)`` into ``delta``; an adapter's is exact.

    Args:
        expert: The expert.
        name: The name of the parameter.
        base: The base's parameter.
        delta: Where the difference is put.
        infinite: Whether the base is infinite in places; where the expert is so, too, the difference is zero.
    """
    exact = expert.delta(name, base)
    if exact is not None:
        delta.copy_(exact)
        return
    weight = wide(expert[name]).to(base.device)
    if infinite:
        weight, base = without_masks(weight, base)
    if weight.dtype == base.dtype == delta.dtype:
        torch.sub(weight, base, out=delta)
        return
    difference = weight - base
    if not is_finite(difference):  # it may be beyond float32
        difference = weight.to(delta.dtype) - base
    delta.copy_(difference)
