"""The differences of the experts to the base, and whether the values are finite."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_merge.checkpoints import Weights
from lightning_merge.methods.base.context import Context
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.methods.base.statistics import ParameterStatistics
from lightning_merge.methods.base.task_data import TaskData
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.tensors import Scratch, wide


class TaskVectors:
    """The differences ``expert - base`` of every merged parameter, computed when they are asked for.

    Args:
        base: The base.
        experts: T experts.
        names: The merged parameters.
        dtype: What the differences are converted to; they are taken in float32 (float64 if the weights are).
        device: Where they are put; by default where the weights are.
        matrices: Which parameters count as matrices.
        seed: What every parameter's own seed is derived from.
        transform: What is done to the task tensors ``(T, …)`` of a parameter before anyone sees them.
        statistics: What each expert's data say about its parameters, in the order of the experts; or nothing.
        tasks: The experts' module and the data of their tasks; or nothing.
    """

    _tasks: TaskData | None = None

    def __init__(
        self,
        base: Weights,
        experts: Sequence[Weights],
        names: Sequence[str],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        matrices: Matrices = Matrices(),  # noqa: B008, a frozen dataclass
        seed: int = 0,
        transform: Callable[[Tensor, Context], Tensor] | None = None,
        statistics: Sequence[Weights] = (),
        tasks: TaskData | None = None,
    ) -> None:
        self._base = base
        self._experts = experts
        self._names = names
        self._dtype = dtype
        self._device = device
        self.matrices = matrices
        self._seed = seed
        self._transform = transform
        self._statistics = statistics
        self._tasks = tasks

    def __getitem__(self, name: str) -> Tensor:
        """The stacked differences of one parameter: ``(T, …)``."""
        return self.stack(name, self._base[name])

    def stack(self, name: str, own: Tensor, scratch: Scratch | None = None) -> Tensor:
        """The stacked differences of one parameter ``(T, …)`` to the base's ``(…)``, which was read already.

        With a ``scratch`` they stand there, until it is used again.
        """
        base = wide(own).to(self._device)
        empty = torch.empty if scratch is None else scratch.empty
        deltas = empty((len(self._experts), *base.shape), dtype=self._dtype, device=base.device)
        for expert, delta in zip(self._experts, deltas, strict=True):
            _subtract(expert, name, base, delta)
        return deltas if self._transform is None else self._transform(deltas, self.context(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter's name and task tensors, one at a time."""
        for name in self._names:
            yield name, self[name]

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """The same as :meth:`items`, for one look at each: the tensors are overwritten when the next are asked for."""
        scratch = Scratch()
        for name in self._names:
            yield name, self.stack(name, self._base[name], scratch)

    @property
    def num_experts(self) -> int:
        """The number of experts, T."""
        return len(self._experts)

    @property
    def tasks(self) -> TaskData:
        """The experts' module and the data of their tasks, for methods that need them.

        Raises:
            MergeError: If there are none, or if these task vectors are no differences of the module's parameters.
        """
        if self._tasks is None:
            raise MergeError(
                "A method that runs the model cannot merge in other coordinates than the parameters' own; use it by "
                "itself and not inside KnOTS or CoreSpace."
            )
        return self._tasks

    def is_matrix(self, name: str) -> bool:
        """Whether a parameter counts as a matrix (or as several), known without reading it."""
        return self.matrices.view(name, self._base.meta[name].shape) is not None

    def numel(self, name: str) -> int:
        """The number of entries of a parameter in one model, known without reading it."""
        return self._base.meta[name].numel()

    def factors(self, name: str) -> list[tuple[Tensor, Tensor]] | None:
        """The LoRA factors ``(B, A)`` that span what the experts did to a parameter; None if they are not known."""
        if self._transform is not None:
            return None
        base = wide(self._base[name])
        found = [expert.factors(name, base) for expert in self._experts]
        return None if None in found else [pair for pairs in found for pair in pairs]

    def map(self, transform: Callable[[Tensor, Context], Tensor]) -> TaskVectors:
        """The same task vectors, seen through one more transformation."""
        before = self._transform
        both = transform if before is None else (lambda deltas, context: transform(before(deltas, context), context))
        other = copy.copy(self)
        other._transform = both
        return other

    def context(self, name: str, survey: Any = None, own: Tensor | None = None) -> Context:
        """What a method's rule may know about a parameter; ``own`` is the base's ``(…)``, if it was read already."""
        base = wide(self._base[name] if own is None else own).to(self._device, self._dtype)
        seed = zlib.crc32(f"{self._seed}/{name}".encode())
        statistics = ParameterStatistics(name, self._statistics, base)
        return Context(name, base, self.matrices, seed, survey, statistics)


def _subtract(expert: Weights, name: str, base: Tensor, delta: Tensor) -> None:
    """Put what an expert did to a parameter ``(…)`` into ``delta``; that of an adapter is exact."""
    exact = expert.delta(name, base)
    if exact is not None:
        delta.copy_(exact)
        return
    weight = wide(expert[name]).to(base.device)
    if weight.dtype == base.dtype == delta.dtype:
        torch.sub(weight, base, out=delta)
    else:
        delta.copy_(weight - base)
