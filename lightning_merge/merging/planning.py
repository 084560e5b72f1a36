"""Say what a merge would do, from headers alone: ``plan(base, experts, …)``, ``lightning-merge merge --plan``."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from lightning_merge.checkpoints import (
    TASK_VECTOR,
    TORCH_SUFFIXES,
    Experts,
    Source,
    Weights,
    open_statistics,
    open_weights,
)
from lightning_merge.checkpoints.adapters import is_adapter
from lightning_merge.checkpoints.experts import open_each
from lightning_merge.checkpoints.streaming import SHARD_SIZE
from lightning_merge.checkpoints.task_vector_files import is_task_vector
from lightning_merge.checkpoints.views import Renamed
from lightning_merge.merging.checks import check_arguments, check_resumable, check_task_data
from lightning_merge.merging.costs import estimate_seconds, factorizes, measure_machine, peak_memory, reads_twice
from lightning_merge.merging.inventory import Inventory, compare
from lightning_merge.merging.merge import precision_of
from lightning_merge.merging.plan import Costs, Plan, size
from lightning_merge.methods import MergeMethod
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.utilities.batches import TaskBatches
from lightning_merge.utilities.errors import MergeError, problems_of
from lightning_merge.utilities.workers import count_workers


def plan(
    base: Source,
    experts: Experts,
    method: MergeMethod,
    *,
    statistics: Mapping[str, Source] | None = None,
    module: nn.Module | None = None,
    data: TaskBatches | None = None,
    scale: float | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    matrices: Matrices | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    workers: int | None = None,
    allow_non_finite: bool = False,
    keep_update: bool = False,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    shard_size: int = SHARD_SIZE,
    distributed: bool = False,
) -> Plan:
    """Say what :func:`lightning_merge.merge` would do with the same arguments, and everything that stands in its way.

    Only headers are read: names, shapes and dtypes. Nothing is written, and nothing computed beside a few small
    matrices, to see how fast this machine is. The arguments are those of :func:`lightning_merge.merge`; ``seed`` makes
    no difference, and the costs are those of the whole merge by one process, whatever ``resume`` and ``distributed``.

    Args:
        base: The model that the experts started from.
        experts: The experts.
        method: How to merge.
        statistics: What each expert's data say about its parameters.
        module: For methods that run the model: the module.
        data: For the same methods: each expert's data.
        scale: Scaling coefficient of the update.
        include: Merge only these.
        exclude: Do not merge these.
        matrices: Which parameters count as matrices.
        dtype: Precision of the arithmetic.
        device: Where to compute.
        seed: Of random numbers.
        workers: Parameters that are merged at the same time.
        allow_non_finite: Do not look for values that are not finite.
        keep_update: Keep the update in memory.
        output: The file or folder to write.
        resume: Go on with a half-finished merge.
        shard_size: The most bytes of one file in a folder.
        distributed: Share the work with other processes.

    Returns:
        The plan; what stands in the way is in its ``problems`` and is not raised.
    """
    method = method if scale is None else replace(method, scale=scale)
    where = None if output is None else str(output)
    try:
        origin = open_weights(base, name="base")
    except MergeError as error:
        names = tuple(map(str, experts)) if isinstance(experts, Mapping) else tuple(map(_name, experts))
        return Plan(method.describe(), names, where, (*error.problems, *_unreadable(experts)))
    models = _open(origin, experts, method, statistics, include, exclude)
    problems = models.problems
    problems += problems_of(
        check_arguments, method, origin, models.as_many_as(experts), workers, dtype, output, resume, shard_size
    )
    problems += problems_of(_check_device, device)
    if resume:
        problems += problems_of(check_resumable, models.statistics)
    if method.needs_data:
        kind = type(method).__name__
        problems += problems_of(check_task_data, kind, module, data, origin, models.experts, models.inventory)
    if output is not None:
        twice = Path(output).suffix in TORCH_SUFFIXES  # it is written as a safetensors file first
        problems += problems_of(_check_space, Path(output).expanduser(), models.stored * (2 if twice else 1))
    rule = matrices or Matrices()
    shapes = _count_matrices(origin, models.inventory, rule)
    costs = None
    if not problems:
        precision = dtype or precision_of(method, origin, models.experts.values())
        write = 0 if output is None else models.stored
        costs = _costs(
            models,
            method,
            shapes,
            precision,
            device,
            count_workers(workers, torch.device(device or "cpu"), models.values["merged"]),
            not allow_non_finite,
            write,
        )
        kept = (0 if output is not None else models.stored) + keep_update * models.values["merged"] * precision.itemsize
        costs = replace(costs, memory=costs.memory + kept)
    return Plan(
        method.describe(),
        tuple(models.experts),
        where,
        tuple(problems),
        models.inventory,
        models.values | {"matrices": sum(count * m * n for count, m, n in shapes)},
        shapes,
        {name: str(expert.prefix) for name, expert in models.experts.items() if isinstance(expert, Renamed)},
        costs,
        tuple([*models.other_dtypes(), *_notes(method, models, allow_non_finite)]),
    )


@dataclass(frozen=True)
class _Models:
    """What is to be merged, as far as it could be opened."""

    base: Weights
    experts: dict[str, Weights]
    statistics: list[Weights]
    inventory: Inventory
    problems: list[str] = field(default_factory=list)

    @property
    def values(self) -> dict[str, int]:
        """The number of entries of each part of the inventory."""
        parts = {key: getattr(self.inventory, key) for key in ("merged", "averaged", "copied")}
        return {key: sum(self.base.meta[name].numel() for name in names) for key, names in parts.items()}

    @property
    def stored(self) -> int:
        """The bytes of the merged model."""
        found = self.inventory
        return _bytes(self.base.meta[name] for name in found.stored)

    def other_dtypes(self) -> list[str]:
        """A sentence for each expert some of whose parameters are stored in another precision than the base's."""
        sentences = []
        for name, expert in self.experts.items():
            pairs = [
                (self.base.meta[key].dtype, expert.meta[key].dtype) for key in self.inventory.merged if key in expert
            ]
            found = Counter((_short(mine), _short(theirs)) for mine, theirs in pairs if mine != theirs)
            sentences += [
                f"{count} of the merged parameters are {theirs} in {name} and {mine} in the base, whose type they keep."
                for (mine, theirs), count in found.items()
            ]
        return sentences

    def as_many_as(self, experts: Experts) -> dict[str, Weights]:
        """As many experts as were given, with the base in the place of those that cannot be opened."""
        return self.experts | {f"absent {i}": self.base for i in range(len(experts) - len(self.experts))}


def _open(
    base: Weights,
    experts: Experts,
    method: MergeMethod,
    statistics: Mapping[str, Source] | None,
    include: Sequence[str] | None,
    exclude: Sequence[str],
) -> _Models:
    opened, problems = open_each(experts, base, read=False)
    inventory, conflicts = compare(base, list(opened.values()), include, exclude)
    problems += conflicts
    measured: list[Weights] = []
    try:
        measured = open_statistics(statistics, method.needs, base, opened, inventory.merged, read=False)
    except MergeError as error:
        problems += error.problems
    return _Models(base, opened, measured, inventory, problems)


def _unreadable(experts: Experts) -> list[str]:
    """What is wrong with the experts' files, where there is no base to compare them with."""
    sources = experts.values() if isinstance(experts, Mapping) else experts
    whole = [source for source in sources if not (is_adapter(source) or is_task_vector(source))]
    return [problem for source in whole for problem in problems_of(open_weights, source)]


def _name(source: Source) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else "a state dict"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_device(device: torch.device | str | None) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MergeError(f"The device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def _check_space(output: Path, needed: int) -> None:
    """Raise a MergeError if a model does not fit on the disk; what it replaces is there until it is complete."""
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MergeError(
            f"{output} takes {size(needed)} to write, and {size(free)} are free in {folder}; make room, or write "
            "elsewhere."
        )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _count_matrices(base: Weights, inventory: Inventory, rule: Matrices) -> tuple[tuple[int, int, int], ...]:
    counts: Counter[tuple[int, int]] = Counter()
    for name in inventory.merged:
        if (view := rule.view(name, base.meta[name].shape)) is not None:
            blocks, m, n = view
            counts[m, n] += blocks
    ordered = sorted(counts.items(), key=lambda item: (-item[1] * item[0][0] * item[0][1], item[0]))
    return tuple((count, m, n) for (m, n), count in ordered)


def _costs(
    models: _Models,
    method: MergeMethod,
    matrices: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    device: torch.device | str | None,
    workers: int,
    looks: bool,
    write: int,
) -> Costs:
    everything = [models.base, *models.experts.values(), *models.statistics]
    whole = sum(map(_stored_bytes, everything))
    hashed = sum(_stored_bytes(weights) for weights in everything if weights.inputs)
    passes = 1 + looks + bool(hashed)  # to merge, to look for values that are not finite, and for the sha256
    read = whole * (1 + looks) + hashed
    sizes = [models.base.meta[name].numel() for name in models.inventory.merged]
    count = len(models.experts)
    seconds = estimate_seconds(
        method,
        matrices,
        sum(sizes),
        count,
        dtype.itemsize,
        read + write,
        hashed,
        workers,
        measure_machine(device),
    )
    factorized = matrices if factorizes(method) else ()
    memory = peak_memory(sizes, factorized, count, dtype.itemsize, workers)
    return Costs(read, passes, write, memory, seconds, reads_twice(method))


def _stored_bytes(weights: Weights) -> int:
    """What there is to read of a model: of a difference its own file, as it is put on a base that is read anyway."""
    if weights.origin is not None:
        return weights.path.stat().st_size
    return _bytes(tensor for name, tensor in weights.meta.items() if name not in weights.tied)


def _notes(method: MergeMethod, models: _Models, allow_non_finite: bool) -> list[str]:
    notes = ["Only headers were read."]
    if not allow_non_finite:
        notes.append("Whether all values are finite is seen when the merge reads them.")
    if method.needs:
        notes.append("So is whether the statistics are of these very weights.")
    if any(TASK_VECTOR in expert.header for expert in models.experts.values()):
        notes.append("So is whether the task vectors are differences to this very base.")
    if method.needs_data:
        notes.append("What it takes to run the model on data comes on top of the time and the memory.")
    return [" ".join(notes)]
