"""Merge experts into one model: ``merge(base, experts, method)``."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge import __version__
from lightning_merge.checkpoints import Source, Weights, check_output, open_weights
from lightning_merge.errors import MergeError, problems_of, raise_all
from lightning_merge.folders import check_folder, is_folder
from lightning_merge.lora import open_expert
from lightning_merge.matrices import Matrices
from lightning_merge.merged import Computation, Merged
from lightning_merge.methods import MergeMethod
from lightning_merge.prefixes import match_names
from lightning_merge.statistics import open_statistics
from lightning_merge.task_data import Data, TaskData, check_task_data
from lightning_merge.task_vectors import Inventory, TaskVectors, find_non_finite, take_inventory, wide

Experts = Sequence[Source] | Mapping[str, Source]
"""The experts: a sequence of sources, or a mapping from the expert's name to its source."""


def merge(
    base: Source,
    experts: Experts,
    method: MergeMethod,
    *,
    statistics: Mapping[str, Source] | None = None,
    module: nn.Module | None = None,
    data: Data | None = None,
    scale: float | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    matrices: Matrices | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    workers: int = 1,
    allow_non_finite: bool = False,
    keep_update: bool = False,
    output: str | os.PathLike[str] | None = None,
) -> Merged:
    """Merge experts that were fine-tuned from one base.

    All conflicts between the models are found before anything is computed. The inputs are never changed.

    Args:
        base: The model that the experts started from: a file, a folder, or a state dict.
        experts: The experts: a sequence of sources, or a mapping from a name to a source. The folder of a LoRA adapter,
            as peft writes it, is an expert, too.
        method: How to merge, e.g. ``lightning_merge.methods.SCORE()``.
        statistics: For methods that need them: what each expert's data say about its parameters, a source for each
            expert's name, see :mod:`lightning_merge.statistics`; by default the files beside the experts'.
        module: For methods that run the model while they merge: the module that the weights are of, which maps images
            to logits. It is run on the device it is on, and is not changed.
        data: For the same methods: for each expert's name unlabelled batches of its task that can be read again and
            again (a ``DataLoader``, a list), each ``images`` or ``(images, labels)``; labels are never looked at.
        scale: Scaling coefficient of the update; by default the method's own.
        include: Merge only the parameters whose name matches one of these shell patterns.
        exclude: Do not merge those that match one of these; ``weights`` keeps the base's, ``for_task`` the expert's.
        matrices: Which parameters count as matrices.
        dtype: Precision of the arithmetic; by default float64 for methods that factorize and float32 for the others.
        device: Where to compute; by default where the base's weights are.
        seed: For methods that draw random numbers; every parameter derives its own from this and its name.
        workers: Parameters that are merged at the same time. The result is the same for any number.
        allow_non_finite: Merge weights that hold NaN or infinite values instead of refusing them.
        keep_update: Keep the update in memory, in the precision of the arithmetic, for ``Merged.rescaled``.
        output: Also write the merged model, once it is complete in memory, to this file or folder, see
            :meth:`Merged.save`.

    Returns:
        The merged model.

    Raises:
        MergeError: If the models do not fit together, hold values that are not finite, or cannot be read or written.
    """
    if scale is not None:
        method = replace(method, scale=scale)
    matrices = matrices or Matrices()
    origin = open_weights(base, name="base")
    sources = open_experts(experts, origin)
    check_arguments(method, origin, sources, workers, dtype, output)
    inventory = take_inventory(origin, list(sources.values()), include, exclude)
    if method.needs_data:
        check_task_data(type(method).__name__, module, data, origin, sources, inventory)
    measured = open_statistics(statistics, method.needs, origin, sources, inventory.merged)
    if not allow_non_finite:
        _check_finite(origin, sources, inventory, method, measured)

    kept = keep(origin, sources, inventory)
    tasks = TaskData(module, data, kept, sources, inventory, _widest(origin), seed) if method.needs_data else None
    task_vectors = TaskVectors(
        origin,
        list(sources.values()),
        inventory.merged,
        dtype or torch.promote_types(method.dtype, _widest(origin)),
        device,
        matrices,
        seed,
        statistics=measured,
        tasks=tasks,
    )
    survey = method.survey(task_vectors)
    updates: dict[str, Tensor] | None = {} if keep_update else None
    computation = Computation(method, origin, task_vectors, survey, inventory, workers, updates)
    weights = computation.merged() | kept
    weights |= {alias: weights[owner] for alias, owner in inventory.tied.items()}

    settings = {
        "matrices": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(matrices).items()},
        "include": None if include is None else list(include),
        "exclude": list(exclude),
        "dtype": None if dtype is None else str(dtype),
        "seed": seed,
        "allow_non_finite": allow_non_finite,
    }
    first = next(iter(sources.values()))
    merged = Merged(
        weights={name: weights[name] for name in origin},
        base=origin,
        inventory=inventory,
        manifest=make_manifest(method, settings, origin, sources, dict(zip(sources, measured, strict=False))),
        experts=sources,
        hyper_parameters=origin.header.get("hyper_parameters") or first.header.get("hyper_parameters") or {},
        computation=computation if method.per_task or keep_update else None,
    )
    if output is not None:
        merged.save(output)
    return merged


def check_arguments(
    method: MergeMethod,
    base: Weights,
    experts: Mapping[str, Weights],
    workers: int | None,
    dtype: torch.dtype | None,
    output: str | os.PathLike[str] | None,
    resume: bool = False,
    shard_size: int = 1,
) -> None:
    """See that a merge can be done and written as it is asked for, before any work.

    Raises:
        MergeError: If not; every problem is listed.
    """
    problems = []
    if workers is not None and workers < 1:
        problems.append(f"workers must be at least 1, got {workers}.")
    if shard_size < 1:
        problems.append(f"shard_size is a number of bytes and must be at least 1, got {shard_size}.")
    if resume and output is None:
        problems.append("resume goes on with a half-finished output; give output, too.")
    in_memory = [weights.name for weights in (base, *experts.values()) if weights.path is None]
    if resume and in_memory:
        problems.append(
            f"A merge can only be resumed if all of its inputs are files, and {', '.join(in_memory)} is in memory."
        )
    if dtype not in (None, torch.float32, torch.float64):
        problems.append(f"The arithmetic can be float32 or float64, not {dtype}.")
    problems += problems_of(method.check_count, len(experts))
    if output is not None and is_folder(output):
        problems += problems_of(check_folder, output, base.path, [base, *experts.values()])
    elif output is not None:
        problems += problems_of(check_output, output, [base, *experts.values()])
    raise_all(problems)


def _check_finite(
    base: Weights,
    experts: Mapping[str, Weights],
    inventory: Inventory,
    method: MergeMethod,
    statistics: Sequence[Weights],
) -> None:
    models = {"the base": base} | {f"the expert {name}": expert for name, expert in experts.items()}
    measured = [f"{kind}.{name}" for kind in method.needs for name in inventory.merged]
    raise_all(
        find_non_finite(models, [*inventory.merged, *inventory.averaged])
        + find_non_finite({source.name: source for source in statistics}, measured)
    )


def _widest(base: Weights) -> torch.dtype:
    """Float64 where some of the weights are, else float32."""
    dtypes = {tensor.dtype for tensor in base.meta.values()}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def keep(base: Weights, experts: Mapping[str, Weights], inventory: Inventory) -> dict[str, Tensor]:
    """What the merged model has beside the merged parameters: the mean of running statistics, copies of the base's."""
    means = {}
    for name in inventory.averaged:
        copies = [wide(expert[name]).to(base[name].device) for expert in experts.values()]
        means[name] = torch.stack(copies).mean(dim=0).to(base[name])
    return means | {name: base[name].clone() for name in inventory.copied}


def open_experts(experts: Experts, base: Weights) -> dict[str, Weights]:
    """Open every expert for reading, under its name, its path, or (a state dict in a list) its position.

    Adapters, as peft writes them, are opened over the base. Experts whose names differ from the base's by a prefix are
    seen under the base's names, see :mod:`lightning_merge.prefixes`.

    Raises:
        MergeError: If experts cannot be opened, or if there are none; every problem is listed.
    """
    named, problems = open_each(experts, base)
    raise_all(problems)
    return named


def open_each(experts: Experts, base: Weights) -> tuple[dict[str, Weights], list[str]]:
    """Open the experts that can be opened, and list what is wrong with the others, see :func:`open_experts`."""
    named: dict[str, Weights] = {}
    problems = []
    unnamed = not isinstance(experts, Mapping)
    for key, source in enumerate(experts) if unnamed else experts.items():
        is_path = isinstance(source, (str, os.PathLike, Weights))
        try:
            weights = open_expert(source, base, None if unnamed and is_path else str(key))
        except MergeError as error:
            problems += error.problems
            continue
        name = weights.name if unnamed else key
        if name in named:
            problems.append(f"The expert {name} is given twice.")
        named[name] = match_names(base, weights)
    if not experts:
        problems.append("There are no experts to merge; give at least one.")
    return named, problems


def make_manifest(
    method: MergeMethod,
    settings: Mapping[str, Any],
    base: Weights,
    experts: Mapping[str, Weights],
    statistics: Mapping[str, Weights],
) -> dict[str, Any]:
    """Record how a merge came to be: plain values only, so that it can be stored anywhere."""

    def source(weights: Weights) -> dict[str, Any]:
        return {"path": str(weights.path) if weights.path else None, "sha256": weights.fingerprint()}

    return {
        "method": method.describe(),
        **settings,
        "base": source(base),
        "experts": {name: source(weights) for name, weights in experts.items()},
        "statistics": {name: source(weights) for name, weights in statistics.items()},
        "versions": {
            "lightning_merge": __version__,
            "torch": str(torch.__version__),
            "python": ".".join(map(str, sys.version_info[:3])),
        },
    }
