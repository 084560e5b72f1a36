"""What is merged of a set of models, and how: which parameters they share, and the differences to the base."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from lightning_merge.checkpoints import Weights
from lightning_merge.errors import MergeError, raise_all
from lightning_merge.matrices import Matrices, matches
from lightning_merge.methods.base import Context
from lightning_merge.statistics import ParameterStatistics
from lightning_merge.task_data import TaskData

_RUNNING_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Inventory:
    """What happens to every parameter of the base.

    Args:
        merged: Merged by the method as task vectors.
        averaged: BatchNorm's running statistics: the mean over the experts. (Adding up differences of variances can
            make a variance negative.)
        copied: Taken from the base: integer buffers, and whatever the user excluded.
        tied: Names that share a tensor with another name: ``{alias: name}``. They stay tied.
        private: Excluded parameters of each expert, by the expert's name.
    """

    merged: tuple[str, ...]
    averaged: tuple[str, ...]
    copied: tuple[str, ...]
    tied: dict[str, str]
    private: dict[str, tuple[str, ...]]


def take_inventory(
    base: Weights, experts: Sequence[Weights], include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> Inventory:
    """Compare the models by names, shapes and dtypes, without reading a tensor.

    Args:
        base: The model that the experts were fine-tuned from.
        experts: The experts.
        include: Merge only the parameters that match one of these patterns.
        exclude: Do not merge the parameters that match one of these patterns.

    Returns:
        What happens to every parameter.

    Raises:
        MergeError: If the models do not fit together; every conflict is listed.
    """

    def left_out(name: str) -> bool:
        return matches(name, exclude) or (include is not None and not matches(name, include))

    tied = {
        alias: owner
        for alias, owner in base.tied.items()
        if left_out(alias) == left_out(owner) and all(_shares(expert, alias, owner) for expert in experts)
    }
    names = [name for name in base if name not in tied]
    raise_all(_of_another_kind(base, experts, left_out))
    raise_all(
        [
            *_unused_patterns(base, experts, [*(include or ()), *exclude]),
            *_missing(base, experts, left_out, tied),
            *_extra(base, experts, left_out),
            *_different(base, experts, [name for name in names if not left_out(name)]),
        ]
    )
    merged, averaged, copied = [], [], []
    for name in names:
        if left_out(name) or not base.meta[name].is_floating_point():
            copied.append(name)
        elif name.rpartition(".")[2] in _RUNNING_STATISTICS:
            averaged.append(name)
        else:
            merged.append(name)
    if not merged:
        raise_all(["Nothing is left to merge: every parameter is excluded."])
    return Inventory(
        tuple(merged),
        tuple(averaged),
        tuple(copied),
        tied,
        {expert.name: tuple(name for name in expert if left_out(name)) for expert in experts},
    )


def _of_another_kind(base, experts, left_out) -> list[str]:
    """One sentence for an expert that has hardly a name in common with the base, in place of one for each name."""
    own = [name for name in base if not left_out(name)]
    return [
        f"The expert {expert.name} is no fine-tuned form of the base: of the base's {len(own)} parameters it has "
        f"{sum(name in expert for name in own)}. Names look like {own[0]!r} in the base and {next(iter(expert))!r} in "
        "the expert; if only what stands before them differs, give the base as a checkpoint of the same module."
        for expert in experts
        if own and sum(name in expert for name in own) < len(own) / 2
    ]


def _shares(expert: Weights, alias: str, owner: str) -> bool:
    """Whether two names that the base ties are one in the expert, too (a file may leave the second name out)."""
    return alias not in expert or expert.tied.get(alias, alias) == expert.tied.get(owner, owner)


def _unused_patterns(base: Weights, experts: Sequence[Weights], patterns: Sequence[str]) -> list[str]:
    names = {name for model in (base, *experts) for name in model}
    return [
        f"The pattern {pattern!r} matches no parameter; names look like {', '.join(list(base)[:3])}."
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]


def _missing(base, experts, left_out, tied) -> list[str]:
    return [
        f"The expert {expert.name} lacks {name!r}, which the base has; give the expert's complete weights, "
        f"or leave the parameter out with exclude: [{_pattern(name)}]."
        for expert in experts
        for name in base
        if name not in expert and not left_out(name) and name not in tied
    ]


def _extra(base, experts, left_out) -> list[str]:
    return [
        f"The expert {expert.name} has {name!r}, which the base lacks, so that there is no difference to take; "
        f"if it belongs to this expert alone (a head), leave it out with exclude: [{_pattern(name)}], "
        "else give the base that the expert started from."
        for expert in experts
        for name in expert
        if name not in base and not left_out(name) and not _has_twin(expert, name, base)
    ]


def _has_twin(expert: Weights, name: str, base: Weights) -> bool:
    """Whether an expert's name is one more for a tensor that the base has (whose file may leave the second one out)."""
    return any(twin in base and expert.tied.get(twin, twin) == expert.tied.get(name, name) for twin in expert)


def _different(base, experts, names) -> list[str]:
    problems = []
    for expert in experts:
        for name in names:
            if name not in expert:
                continue
            mine, theirs = base.meta[name], expert.meta[name]
            if mine.shape != theirs.shape:
                problems.append(
                    f"{name!r} has shape {tuple(theirs.shape)} in the expert {expert.name} and {tuple(mine.shape)} in "
                    f"the base; leave it out with exclude: [{_pattern(name)}], or give experts of one architecture."
                )
            elif mine.is_complex() or theirs.is_complex():
                problems.append(f"{name!r} is complex, which no method merges; leave it out with exclude: [{name}].")
            elif mine.is_floating_point() != theirs.is_floating_point():
                problems.append(
                    f"{name!r} is {theirs.dtype} in the expert {expert.name} and {mine.dtype} in the base; quantized "
                    f"weights cannot be merged: give floating-point weights, or exclude: [{_pattern(name)}]."
                )
    return problems


def _pattern(name: str) -> str:
    """The pattern that leaves out the module of a parameter: ``head.weight -> head.*``."""
    module, dot, _ = name.rpartition(".")
    return f"{module}.*" if dot else name


def find_non_finite(models: Mapping[str, Weights], names: Sequence[str]) -> list[str]:
    """Say which parameters of which models hold NaN or infinity; reads every tensor once.

    Args:
        models: The models, by what to call them in the sentence: ``the base``, ``the expert photo``.
        names: The parameters to look at.
    """
    return [
        f"{name!r} of {what} holds values that are not finite ({_count_non_finite(model[name])} of "
        f"{model.meta[name].numel()}); was its training diverging? Give another checkpoint, or merge all the same "
        "with allow_non_finite: true."
        for what, model in models.items()
        for name in names
        if name in model and not bool(torch.isfinite(model[name]).all())
    ]


def _count_non_finite(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


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
        base = wide(self._base[name]).to(self._device)
        deltas = torch.stack([_difference(expert, name, base).to(self._dtype) for expert in self._experts])
        return deltas if self._transform is None else self._transform(deltas, self.context(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter's name and task tensors, one at a time."""
        for name in self._names:
            yield name, self[name]

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
        found = [expert.factors(name, base) if hasattr(expert, "factors") else None for expert in self._experts]
        return None if None in found else [pair for pairs in found for pair in pairs]

    def map(self, transform: Callable[[Tensor, Context], Tensor]) -> TaskVectors:
        """The same task vectors, seen through one more transformation."""
        before = self._transform
        both = transform if before is None else (lambda deltas, context: transform(before(deltas, context), context))
        other = copy.copy(self)
        other._transform = both
        return other

    def context(self, name: str, survey: Any = None) -> Context:
        """What a method's rule may know about a parameter."""
        base = wide(self._base[name]).to(self._device, self._dtype)
        seed = zlib.crc32(f"{self._seed}/{name}".encode())
        statistics = ParameterStatistics(name, self._statistics, base)
        return Context(name, base, self.matrices, seed, survey, statistics)


def _difference(expert: Weights, name: str, base: Tensor) -> Tensor:
    """What an expert did to a parameter ``(…)``; that of an adapter is exact."""
    exact = expert.delta(name, base) if hasattr(expert, "delta") else None
    return wide(expert[name]).to(base.device) - base if exact is None else exact


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is: half precision is never computed in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
