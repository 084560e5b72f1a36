"""Merge experts into one model: ``merge(base, experts, method)``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge import __version__
from lightning_merge.checkpoints import Source, Weights, check_output, open_weights
from lightning_merge.computation import Computation, count_workers, mean_of
from lightning_merge.errors import MergeError
from lightning_merge.folders import check_folder, is_folder
from lightning_merge.inspection import check_finite, fingerprint_all
from lightning_merge.lora import LoRAWeights, open_expert
from lightning_merge.matrices import Matrices
from lightning_merge.merged import Merged
from lightning_merge.methods import MergeMethod
from lightning_merge.sharing import Processes
from lightning_merge.statistics import open_statistics
from lightning_merge.streaming import StreamedModel
from lightning_merge.task_data import Data, TaskData, check_task_data
from lightning_merge.task_vectors import Inventory, TaskVectors, take_inventory

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
    shard_size: int = 5_000_000_000,
    distributed: bool = False,
) -> Merged:
    """Merge experts that were fine-tuned from one base.

    All conflicts between the models are found before anything is computed. The inputs are never changed. Files are read
    parameter by parameter, and with an ``output`` the merged model is written in the same way, so that no model is ever
    in memory as a whole.

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
        dtype: Precision of the task vectors and of the arithmetic, float32 or float64; by default the method's own,
            mostly float32. Matrices are factorized in float64 in any case.
        device: Where to compute; by default where the base's weights are.
        seed: For methods that draw random numbers; every parameter derives its own from this and its name.
        workers: Parameters that are merged at the same time, each on one core and with its own memory; by default one
            for each core, at most eight, and one on a GPU. The result is the same for any number.
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
        _check_arguments(method, origin, sources, workers, dtype, output, resume, shard_size)
        inventory = take_inventory(origin, list(sources.values()), include, exclude)
        if method.needs_data:
            check_task_data(type(method).__name__, module, data, origin, sources, inventory)
        measured = open_statistics(statistics, method.needs, origin, sources, inventory.merged)
    device = torch.device(device) if device is not None else origin[inventory.merged[0]].device
    workers = count_workers(workers, device)
    _inspect(method, origin, sources, measured, inventory, allow_non_finite, processes, workers)

    with processes.together():
        tasks = None
        if method.needs_data:
            kept = keep(origin, sources, inventory)
            tasks = TaskData(module, data, kept, sources, inventory, _widest(origin), seed)
        task_vectors = TaskVectors(
            origin,
            list(sources.values()),
            inventory.merged,
            dtype or _precision(method, origin, sources.values()),
            device,
            matrices,
            seed,
            statistics=measured,
            tasks=tasks,
        )
        survey = method.survey(task_vectors)
    updates: dict[str, Tensor] | None = {} if keep_update else None
    computation = Computation(method, origin, sources, task_vectors, survey, inventory, workers, updates)
    settings = {
        "matrices": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(matrices).items()},
        "include": None if include is None else list(include),
        "exclude": list(exclude),
        "dtype": None if dtype is None else str(dtype),
        "device": device.type,
        "seed": seed,
        "allow_non_finite": allow_non_finite,
    }
    first = next(iter(sources.values()))
    merged = Merged(
        weights={},
        base=origin,
        inventory=inventory,
        manifest=make_manifest(method, settings, origin, sources, dict(zip(sources, measured, strict=False))),
        experts=sources,
        hyper_parameters=origin.header.get("hyper_parameters") or first.header.get("hyper_parameters") or {},
        computation=computation if method.per_task or keep_update else None,
    )
    if output is None:
        return replace(merged, weights=_in_memory(computation, processes))
    _to_disk(merged, computation, Path(output), resume, shard_size, processes)
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
    """Hash every file, and see that every value is finite; each process does a part and knows all of it."""
    models = {"the base": base} | {f"the expert {name}": expert for name, expert in experts.items()}
    measured = {source.name: source for source in statistics}
    with processes.together():
        fingerprint_all([*models.values(), *measured.values()], processes, workers)
    if allow_non_finite:
        return
    shared = [*inventory.merged, *inventory.averaged]
    kinds = [f"{kind}.{name}" for kind in method.needs for name in inventory.merged]
    wanted = dict.fromkeys(models, shared) | dict.fromkeys(measured, kinds)
    with processes.together():
        check_finite(models | measured, wanted, processes, workers)


def _in_memory(computation: Computation, processes: Processes) -> dict[str, Tensor]:
    """All parameters of the merged model; every process computes a part of them and gets the others."""
    inventory, base = computation.inventory, computation.base
    shares = processes.share(stored_names(inventory), computation.cost)
    with processes.together():
        weights = computation.parameters(shares[processes.rank])
        _check_unchanged(computation)
    processes.exchange(weights, shares, like=lambda name: torch.empty_like(base[name]))
    weights |= {alias: weights[owner] for alias, owner in inventory.tied.items()}
    return {name: weights[name] for name in base}


def _to_disk(
    merged: Merged, computation: Computation, output: Path, resume: bool, shard_size: int, processes: Processes
) -> None:
    """Write every parameter of the merged model as soon as it is computed; every process writes a part of them."""
    inventory, base = computation.inventory, computation.base
    names = stored_names(inventory)
    model = StreamedModel(
        output,
        {name: base.meta[name] for name in sorted(names, key=list(base).index)},
        inventory.tied,
        merged.manifest,
        merged.hyper_parameters,
        base.path,
        resume,
        shard_size,
    )
    with model.open(processes):
        left = [name for name in names if name not in model.done]
        computation.each(processes.share(left, computation.cost)[processes.rank], model.write)
        _check_unchanged(computation)


def stored_names(inventory: Inventory) -> list[str]:
    """The parameters and buffers that a merged model consists of, each tensor once."""
    return [*inventory.merged, *inventory.averaged, *inventory.copied]


def _check_unchanged(computation: Computation) -> None:
    """See that no file was changed while it was merged."""
    for weights in (computation.base, *computation.experts.values()):
        weights.check_unchanged()


def _check_arguments(
    method: MergeMethod,
    base: Weights,
    experts: Mapping[str, Weights],
    workers: int | None,
    dtype: torch.dtype | None,
    output: str | os.PathLike[str] | None,
    resume: bool,
    shard_size: int,
) -> None:
    if workers is not None and workers < 1:
        raise MergeError(f"workers must be at least 1, got {workers}.")
    if shard_size < 1:
        raise MergeError(f"shard_size is a number of bytes and must be at least 1, got {shard_size}.")
    if resume and output is None:
        raise MergeError("resume goes on with a half-finished output; give output, too.")
    in_memory = [weights.name for weights in (base, *experts.values()) if weights.path is None]
    if resume and in_memory:
        raise MergeError(
            f"A merge can only be resumed if all of its inputs are files, and {', '.join(in_memory)} is in memory."
        )
    if dtype not in (None, torch.float32, torch.float64):
        raise MergeError(f"The arithmetic can be float32 or float64, not {dtype}.")
    if method.max_experts is not None and len(experts) > method.max_experts:
        raise MergeError(
            f"{type(method).__name__} merges at most {method.max_experts} experts, and {len(experts)} are given."
        )
    if len(experts) < method.min_experts:
        raise MergeError(
            f"{method!r} needs at least {method.min_experts} experts, and {len(experts)} are given; give more, or "
            "change what asks for so many."
        )
    if output is not None and is_folder(output):
        check_folder(output, base.path)
    elif output is not None:
        check_output(output, inputs=[base, *experts.values()])


def _precision(method: MergeMethod, base: Weights, experts: Iterable[Weights]) -> torch.dtype:
    """The precision of the task vectors: the method's own, but float64 where weights or differences have more digits."""
    exact = method.factorizes and any(isinstance(expert, LoRAWeights) for expert in experts)  # they keep their low rank
    return torch.promote_types(method.dtype, torch.float64 if exact else _widest(base))


def _widest(base: Weights) -> torch.dtype:
    """Float64 where some of the weights are, else float32."""
    dtypes = {tensor.dtype for tensor in base.meta.values()}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def keep(base: Weights, experts: Mapping[str, Weights], inventory: Inventory) -> dict[str, Tensor]:
    """What the merged model has beside the merged parameters: the mean of running statistics, copies of the base's."""
    means = {name: mean_of(name, base, experts) for name in inventory.averaged}
    return means | {name: base[name].clone() for name in inventory.copied}


def open_experts(experts: Experts, base: Weights) -> dict[str, Weights]:
    """Open every expert for reading, under its name, its path, or (a state dict in a list) its position.

    Adapters, as peft writes them, are opened over the base.
    """
    if isinstance(experts, Mapping):
        named = {name: open_expert(source, base, name) for name, source in experts.items()}
    else:
        named = {}
        for i, source in enumerate(experts):
            weights = open_expert(source, base, None if isinstance(source, (str, os.PathLike, Weights)) else str(i))
            if weights.name in named:
                raise MergeError(f"The expert {weights.name} is given twice.")
            named[weights.name] = weights
    if not named:
        raise MergeError("There are no experts to merge; give at least one.")
    return named


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
