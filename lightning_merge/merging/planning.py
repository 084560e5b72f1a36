"""Say what a merge would do, from headers and a few weights: ``plan(base, experts, …)``, ``merge --plan``."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

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
from lightning_merge.checkpoints.contents import keep_beside
from lightning_merge.checkpoints.experts import open_each
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.checkpoints.task_vector_files import is_task_vector
from lightning_merge.checkpoints.views import Renamed
from lightning_merge.merging.checks import check_arguments, check_resumable, check_separable, check_task_data
from lightning_merge.merging.computation import precision_of
from lightning_merge.merging.costs import estimate_seconds, factorizes, measure_machine, peak_memory, reads_twice
from lightning_merge.merging.inventory import Inventory, compare
from lightning_merge.merging.notes import notes_on_contents
from lightning_merge.merging.options import MergeOptions
from lightning_merge.merging.origins import measure_origins
from lightning_merge.merging.plan import Costs, Plan, size
from lightning_merge.methods import MergeMethod
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.utilities.errors import MergeError, problems_of
from lightning_merge.utilities.workers import count_workers


def plan(base: Source, experts: Experts, method: MergeMethod, **arguments: Any) -> Plan:
    """Plan what :func:`lightning_merge.merge` would do with the same arguments, and list what stands in its way.

    Headers are read, with names, shapes and dtypes, and a sample of the weights, to see whether the experts come from
    this base. Nothing is written, and nothing else is computed besides a few small matrices, to see how fast this
    machine is. ``seed`` makes no difference, and the costs are those of the whole merge by one process, whatever
    ``resume`` and ``distributed``.

    Args:
        base: The model that the experts started from.
        experts: The experts.
        method: How to merge.
        arguments: The other arguments of :func:`lightning_merge.merge`, under the same names.

    Returns:
        The plan; what stands in the way is in its ``problems`` and is not raised.

    Raises:
        TypeError: If there is no such argument.
    """
    options = MergeOptions(**arguments)
    method = options.scaled(method)
    output = None if options.output is None else str(options.output)
    try:
        base = open_weights(base, name="base")
    except MergeError as error:
        names = tuple(map(str, experts)) if isinstance(experts, Mapping) else tuple(map(_name, experts))
        return Plan(method.describe(), names, output, (*error.problems, *_unreadable(experts)))
    models = _open(base, experts, method, options)
    problems = [*models.problems, *_problems(models, models.as_many_as(experts), method, options)]
    origins = _origins(models, options, problems)
    shapes = _count_matrices(base, models.inventory, options.rule)
    return Plan(
        method.describe(),
        tuple(models.experts),
        output,
        tuple(problems),
        models.inventory,
        models.values | {"matrices": sum(count * m * n for count, m, n in shapes)},
        shapes,
        {name: str(expert.prefix) for name, expert in models.experts.items() if isinstance(expert, Renamed)},
        None if problems else _costs(models, method, shapes, options),
        tuple(
            [
                *origins,
                *models.notes(options.output),
                *models.other_dtypes(),
                *_notes(method, models, options),
            ]
        ),
    )


def _origins(models: _Models, options: MergeOptions, problems: list[str]) -> list[str]:
    """Say how the experts lie to the base; add to the problems that one does not come from it."""
    if problems:
        return []
    origins = measure_origins(models.base, models.experts, models.inventory.merged)
    problem, warning = (None, None) if options.allow_strangers else (origins.problem(), origins.warning())
    problems += [problem] if problem is not None else []
    return [said for said in (origins.summary(), None if problem else warning) if said is not None]


def _problems(models: _Models, experts: Mapping[str, Weights], method: MergeMethod, options: MergeOptions) -> list[str]:
    """List what stands in the way of merging models that could be opened.

    Args:
        models: What could be opened.
        experts: As many experts as were given.
        method: The method.
        options: The other arguments of the merge.
    """
    problems = problems_of(check_arguments, method, models.base, experts, options)
    problems += problems_of(check_separable, method, models.inventory)
    problems += problems_of(_check_device, options.device)
    if options.resume:
        problems += problems_of(check_resumable, models.statistics)
    if method.needs_data:
        kind = type(method).__name__
        module, data, inventory = options.module, options.data, models.inventory
        problems += problems_of(check_task_data, kind, module, data, models.base, models.experts, inventory)
    if options.output is not None:
        twice = Path(options.output).suffix in TORCH_SUFFIXES  # it is written as a safetensors file first
        size_on_disk = models.stored * (2 if twice else 1)
        problems += problems_of(_check_space, local_path(options.output), size_on_disk)
    return problems


@dataclass(frozen=True)
class _Models:
    """Models to merge, as far as they could be opened."""

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
        """The size of the merged model in bytes."""
        return _bytes(self.base.meta[name] for name in self.inventory.stored)

    def notes(self, output: str | os.PathLike[str] | None) -> list[str]:
        """Say which of several sets of weights in a file is taken, and what the merged checkpoint will not keep."""
        headers = [model.header for model in (self.base, *self.experts.values())][:2]
        return list(notes_on_contents([self.base, *self.experts.values()], keep_beside(headers)[1], output))

    def other_dtypes(self) -> list[str]:
        """Count, in a sentence for each expert, the parameters stored in another precision than the base's."""
        sentences = []
        for name, expert in self.experts.items():
            pairs = [
                (self.base.meta[key].dtype, expert.meta[key].dtype) for key in self.inventory.merged if key in expert
            ]
            counts = Counter((_short(old), _short(new)) for old, new in pairs if old != new)
            sentences += [
                f"{count} of the merged parameters are {new} in {name} and {old} in the base, whose type they keep."
                for (old, new), count in counts.items()
            ]
        return sentences

    def as_many_as(self, experts: Experts) -> dict[str, Weights]:
        """Put the base in the place of the experts that cannot be opened, so that as many are left as were given."""
        return self.experts | {f"absent {i}": self.base for i in range(len(experts) - len(self.experts))}


def _open(base: Weights, experts: Experts, method: MergeMethod, options: MergeOptions) -> _Models:
    """Open what can be opened, and list what is wrong with the other models."""
    opened, problems = open_each(experts, base, read=False)
    inventory, conflicts = compare(base, list(opened.values()), options.include, options.exclude)
    problems += conflicts
    statistics: list[Weights] = []
    try:
        statistics = open_statistics(options.statistics, method.needs, base, opened, inventory.merged, read=False)
    except MergeError as error:
        problems += error.problems
    return _Models(base, opened, statistics, inventory, problems)


def _unreadable(experts: Experts) -> list[str]:
    """List what is wrong with the experts' files, where there is no base to compare them with."""
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
    models: _Models, method: MergeMethod, matrices: Sequence[tuple[int, int, int]], options: MergeOptions
) -> Costs:
    """Estimate the costs of a merge that nothing stands in the way of.

    Args:
        models: All models.
        method: The method.
        matrices: ``(count, m, n)``: so many merged matrices of one shape.
        options: The other arguments of the merge.
    """
    dtype = options.dtype or precision_of(method, models.base, models.experts.values())
    workers = count_workers(options.workers, torch.device(options.device or "cpu"), models.values["merged"])
    looks = not options.allow_non_finite
    everything = [models.base, *models.experts.values(), *models.statistics]
    whole = sum(map(_stored_bytes, everything))
    hashed = sum(_stored_bytes(weights) for weights in everything if weights.inputs)
    passes = 1 + looks + bool(hashed)  # to merge, to look for values that are not finite, and for the sha256
    read = whole * (1 + looks) + hashed
    write, in_memory = (0, models.stored) if options.output is None else (models.stored, 0)
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
        measure_machine(options.device),
    )
    memory = peak_memory(sizes, matrices if factorizes(method) else (), count, dtype.itemsize, workers)
    memory += in_memory + options.keep_update * models.values["merged"] * dtype.itemsize
    return Costs(read, passes, write, memory, seconds, reads_twice(method))


def _stored_bytes(weights: Weights) -> int:
    """Count the bytes to read of a model: of a difference its own file, as the base under it is read anyway."""
    if weights.origin is not None and weights.path is not None:
        return weights.path.stat().st_size
    return _bytes(tensor for name, tensor in weights.meta.items() if name not in weights.tied)


def _notes(method: MergeMethod, models: _Models, options: MergeOptions) -> list[str]:
    notes = ["Only headers and a sample of the weights were read."]
    if not options.allow_non_finite:
        notes.append("Whether all values are finite is seen when the merge reads them.")
    if method.needs:
        notes.append("So is whether the statistics are of these very weights.")
    if any(TASK_VECTOR in expert.header for expert in models.experts.values()):
        notes.append("So is whether the task vectors are differences to this very base.")
    if method.needs_data:
        notes.append("What it takes to run the model on data comes on top of the time and the memory.")
    return [" ".join(notes)]
