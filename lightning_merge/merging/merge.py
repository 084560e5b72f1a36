"""Merge experts into one model: ``merge(base, experts, method)``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from lightning_merge.checkpoints import Experts, Source, Weights, open_experts, open_statistics, open_weights
from lightning_merge.checkpoints.streaming import SHARD_SIZE
from lightning_merge.checkpoints.views import mean_of
from lightning_merge.checkpoints.weights import widest
from lightning_merge.merging.checks import check_arguments, check_resumable, check_task_data
from lightning_merge.merging.computation import Computation
from lightning_merge.merging.inspection import check_finite, fingerprint_all
from lightning_merge.merging.inventory import Inventory, take_inventory
from lightning_merge.merging.manifest import make_manifest
from lightning_merge.merging.merged import Merged
from lightning_merge.methods import MergeMethod
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.methods.base.task_data import TaskData
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors
from lightning_merge.utilities.batches import TaskBatches
from lightning_merge.utilities.linalg import paths_taken
from lightning_merge.utilities.processes import Processes
from lightning_merge.utilities.workers import count_workers, one_thread


def merge(
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
            expert's name, see :mod:`lightning_merge.checkpoints.statistics_files`; by default the files
            next to the experts'.
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
            tasks = TaskData(module, data, kept, sources, inventory.tied, inventory.private, widest(origin), seed)
        task_vectors = ExpertTaskVectors(
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


def precision_of(method: MergeMethod, base: Weights, experts: Iterable[Weights]) -> torch.dtype:
    """The precision of the task vectors: the method's own, but float64 where weights or differences have as much."""
    exact = method.factorizes and any(expert.low_rank for expert in experts)  # they keep their low rank
    return torch.promote_types(method.dtype, torch.float64 if exact else widest(base))


def keep(base: Weights, experts: Mapping[str, Weights], inventory: Inventory) -> dict[str, Tensor]:
    """What the merged model has beside the merged parameters: the mean of running statistics, copies of the base's."""
    means = {name: mean_of(name, base, experts) for name in inventory.averaged}
    return means | {name: base[name].clone() for name in inventory.copied}
