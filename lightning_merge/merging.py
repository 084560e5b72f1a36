"""Merge experts into one model: ``merge(base, experts, method)``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge import __version__
from lightning_merge.checkpoints import Source, Weights, check_dtypes, check_output, open_weights
from lightning_merge.computation import Computation, count_workers, mean_of, one_thread
from lightning_merge.errors import MergeError, problems_of, raise_all
from lightning_merge.folders import check_folder, is_folder
from lightning_merge.inspection import check_finite, fingerprint_all
from lightning_merge.inventory import Inventory, take_inventory
from lightning_merge.linalg import paths_taken
from lightning_merge.lora import open_expert
from lightning_merge.matrices import Matrices
from lightning_merge.merged import Merged
from lightning_merge.methods import MergeMethod
from lightning_merge.prefixes import match_names
from lightning_merge.sharing import Processes
from lightning_merge.statistics import open_statistics
from lightning_merge.streaming import SHARD_SIZE
from lightning_merge.task_data import Data, TaskData, check_task_data
from lightning_merge.task_vectors import TaskVectors

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
    workers: int | None = None,
    allow_non_finite: bool = False,
    keep_update: bool = False,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    shard_size: int = SHARD_SIZE,
    distributed: bool = False,
) -> Merged:
    """Merge experts that were fine-tuned from one base.

    All conflicts between the models are found before anything is computed. The inputs are never changed. Files are read
    parameter by parameter, and with an ``output`` the merged model is written in the same way, so that no model is ever
    in memory as a whole.

    Args:
        base: The model that the experts started from: a file, a folder, or a state dict.
        experts: The experts: a sequence of sources, or a mapping from a name to a source. The folder of a LoRA adapter,
            as peft writes it, and the file of a task vector (``lightning_merge.save_task_vector``) are experts, too.
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
        dtype: Precision of the task vectors and of the arithmetic, float32 or float64; by default the method's own,
            mostly float32. Matrices are factorized in float64 in any case.
        device: Where to compute; by default where the base's weights are.
        seed: For methods that draw random numbers; every parameter derives its own from this and its name.
        workers: Parameters that are merged at the same time, each on one core and with its own memory; by default one
            for each core, at most eight, and one on a GPU or for a small model. The result is the same for any number.
        allow_non_finite: Merge weights that hold NaN or infinite values instead of refusing them.
        keep_update: Keep the update in memory, in the precision of the arithmetic, for ``Merged.rescaled``.
        output: Write the merged model to this file or folder while it is computed, instead of holding it in memory;
            ``weights`` then reads it from there. See :meth:`Merged.save` for the kinds of files.
        resume: Go on where an earlier run of the same merge into the same output was interrupted, and keep what is
            finished, in ``.OUTPUT.part``, if this one is. Without it nothing is left of a merge that fails.
        shard_size: The most bytes of one file where the output is a folder; a larger model is divided.
        distributed: Share the parameters with the other processes of the default process group (torchrun, Lightning's
            ddp, SLURM); all of them must make the same call, and see the same files. The result is the same for any
            number of processes, and all of them return it.

    Returns:
        The merged model.

    Raises:
        MergeError: If the models do not fit together, hold values that are not finite, or cannot be read or written.
    """
    if scale is not None:
        method = replace(method, scale=scale)
    processes = Processes(distributed)
    matrices = matrices or Matrices()
    with processes.together():
        origin = open_weights(base, name="base")
        sources = open_experts(experts, origin)
        check_arguments(method, origin, sources, workers, dtype, output, resume, shard_size)
        inventory = take_inventory(origin, list(sources.values()), include, exclude)
        if method.needs_data:
            check_task_data(type(method).__name__, module, data, origin, sources, inventory)
        measured = open_statistics(statistics, method.needs, origin, sources, inventory.merged)
        if resume:
            check_resumable(measured)
        home = origin[inventory.merged[0]].device
    device = torch.device(device) if device is not None else home
    workers = count_workers(workers, device, sum(origin.meta[name].numel() for name in inventory.merged))
    _inspect(method, origin, sources, measured, inventory, allow_non_finite, processes, workers)

    settings = {
        "matrices": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(matrices).items()},
        "include": None if include is None else list(include),
        "exclude": list(exclude),
        "dtype": None if dtype is None else str(dtype),
        "device": device.type,
        "seed": seed,
        "allow_non_finite": allow_non_finite,
    }
    with processes.together():
        tasks = None
        if method.needs_data:
            kept = keep(origin, sources, inventory)
            tasks = TaskData(module, data, kept, sources, inventory, widest(origin), seed)
        task_vectors = TaskVectors(
            origin,
            list(sources.values()),
            inventory.merged,
            dtype or precision_of(method, origin, sources.values()),
            device,
            matrices,
            seed,
            statistics=measured,
            tasks=tasks,
        )
        with paths_taken() as paths, nullcontext() if method.needs_data else one_thread():
            survey = method.survey(task_vectors)
        manifest = make_manifest(method, settings, origin, sources, dict(zip(sources, measured, strict=False)))
    updates: dict[str, Tensor] | None = {} if keep_update else None
    computation = Computation(method, origin, sources, task_vectors, survey, inventory, workers, updates)
    first = next(iter(sources.values()))
    merged = Merged(
        weights={},
        base=origin,
        inventory=inventory,
        manifest=manifest,
        experts=sources,
        hyper_parameters=origin.header.get("hyper_parameters") or first.header.get("hyper_parameters") or {},
        paths=paths,
        computation=computation if method.per_task or keep_update else None,
    )
    with paths_taken(paths):
        if output is None:
            return replace(merged, weights=_in_memory(computation, home, processes))
        _to_disk(merged, computation, output, resume, shard_size, processes)
    return replace(merged, weights=open_weights(output, "the merged model"))


def _inspect(
    method: MergeMethod,
    base: Weights,
    experts: Mapping[str, Weights],
    statistics: Sequence[Weights],
    inventory: Inventory,
    allow_non_finite: bool,
    processes: Processes,
    workers: int,
) -> None:
    """Hash every file, and see that every value that goes in is finite; each process does a part of it."""
    models = {"the base": base} | {f"the expert {name}": expert for name, expert in experts.items()}
    measured = {source.name: source for source in statistics}
    fingerprint_all([*models.values(), *measured.values()], processes, workers)
    if allow_non_finite:
        return
    shared = [*inventory.merged, *inventory.averaged]
    kinds = [f"{kind}.{name}" for kind in method.needs for name in inventory.merged]
    wanted = dict.fromkeys(models, shared) | dict.fromkeys(measured, kinds)
    wanted["the base"] = [*shared, *inventory.copied]
    check_finite(models | measured, wanted, processes, workers)


def _in_memory(computation: Computation, home: torch.device, processes: Processes) -> dict[str, Tensor]:
    """All parameters of the merged model; every process computes a part of them and gets the others."""
    inventory, base = computation.inventory, computation.base
    shares = processes.share(inventory.stored, computation.cost)
    with processes.together():
        weights = computation.parameters(shares[processes.rank])
        _check_unchanged(computation)
    processes.exchange(weights, shares, like=lambda name: torch.empty_like(base.meta[name], device=home))
    weights |= {alias: weights[owner] for alias, owner in inventory.tied.items()}
    return {name: weights[name] for name in base}


def _to_disk(
    merged: Merged,
    computation: Computation,
    output: str | os.PathLike[str],
    resume: bool,
    shard_size: int,
    processes: Processes,
) -> None:
    """Write every parameter of the merged model as soon as it is computed; every process writes a part of them."""
    model = merged.writer(output, resume=resume, shard_size=shard_size)
    with model.open(processes):
        left = [name for name in merged.inventory.stored if name not in model.done]
        computation.each(processes.share(left, computation.cost)[processes.rank], model.write)
        _check_unchanged(computation)


def _check_unchanged(computation: Computation) -> None:
    """See that no file was changed while it was merged."""
    for weights in (computation.base, *computation.experts.values()):
        weights.check_unchanged()


def check_arguments(
    method: MergeMethod,
    base: Weights,
    experts: Mapping[str, Weights],
    workers: int | None = None,
    dtype: torch.dtype | None = None,
    output: str | os.PathLike[str] | None = None,
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
    if resume and method.needs_data:
        problems.append(
            f"{type(method).__name__} runs the model on data, which may be others by now; it cannot be resumed."
        )
    if resume:
        problems += problems_of(check_resumable, [base, *experts.values()])
    if dtype not in (None, torch.float32, torch.float64):
        problems.append(f"The arithmetic can be float32 or float64, not {dtype}.")
    problems += problems_of(method.check_count, len(experts))
    if output is not None and is_folder(output):
        problems += problems_of(check_folder, output, base.path, [base, *experts.values()])
    elif output is not None:
        problems += problems_of(check_output, output, [base, *experts.values()])
    if output is not None:
        problems += problems_of(check_dtypes, output, base.meta)
    raise_all(problems)


def check_resumable(inputs: Iterable[Weights]) -> None:
    """Raise a :class:`MergeError` if an input is in memory: nobody could tell whether it is still the same."""
    raise_all(
        [
            f"A merge can only be resumed if all of its inputs are files, and {weights.name} is in memory; give a file."
            for weights in inputs
            if not weights.inputs
        ]
    )


def precision_of(method: MergeMethod, base: Weights, experts: Iterable[Weights]) -> torch.dtype:
    """The precision of the task vectors: the method's own, but float64 where weights or differences have as much."""
    exact = method.factorizes and any(expert.low_rank for expert in experts)  # they keep their low rank
    return torch.promote_types(method.dtype, torch.float64 if exact else widest(base))


def widest(base: Weights) -> torch.dtype:
    """Float64 where some of the weights are, else float32."""
    dtypes = {tensor.dtype for tensor in base.meta.values()}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def keep(base: Weights, experts: Mapping[str, Weights], inventory: Inventory) -> dict[str, Tensor]:
    """What the merged model has beside the merged parameters: the mean of running statistics, copies of the base's."""
    means = {name: mean_of(name, base, experts) for name in inventory.averaged}
    return means | {name: base[name].clone() for name in inventory.copied}


def open_experts(experts: Experts, base: Weights) -> dict[str, Weights]:
    """Open every expert for reading, under its name, its path, or (a state dict in a list) its position.

    Adapters, as peft writes them, and task vectors are opened over the base. Experts whose names differ from the base's
    by a prefix are seen under the base's names, see :mod:`lightning_merge.prefixes`.

    Raises:
        MergeError: If experts cannot be opened, or if there are none; every problem is listed.
    """
    named, problems = open_each(experts, base)
    raise_all(problems)
    return named


def open_each(experts: Experts, base: Weights, *, read: bool = True) -> tuple[dict[str, Weights], list[str]]:
    """Open the experts that can be opened, and list what is wrong with the others, see :func:`open_experts`."""
    named: dict[str, Weights] = {}
    problems = []
    unnamed = not isinstance(experts, Mapping)
    for key, source in enumerate(experts) if unnamed else experts.items():
        is_path = isinstance(source, (str, os.PathLike, Weights))
        try:
            weights = open_expert(source, base, None if unnamed and is_path else str(key), read=read)
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
    return {
        "method": method.describe(),
        **settings,
        "base": base.provenance(),
        "experts": {name: weights.provenance() for name, weights in experts.items()},
        "statistics": {name: weights.provenance() for name, weights in statistics.items()},
        "versions": {
            "lightning_merge": __version__,
            "torch": str(torch.__version__),
            "python": ".".join(map(str, sys.version_info[:3])),
        },
    }
