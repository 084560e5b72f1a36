"""Merge experts into one model: ``merge(base, experts, method)``."""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_merge.checkpoints import Experts, Source, open_weights
from lightning_merge.checkpoints.contents import keep_beside
from lightning_merge.checkpoints.streaming import SHARD_SIZE
from lightning_merge.merging.computation import Computation, in_sentences, precision_of
from lightning_merge.merging.inputs import Inputs, inspect_inputs, open_inputs, task_data_of
from lightning_merge.merging.inspection import Values
from lightning_merge.merging.manifest import make_manifest
from lightning_merge.merging.merged import Merged
from lightning_merge.merging.notes import notes_on_contents
from lightning_merge.merging.options import MergeOptions
from lightning_merge.methods import MergeMethod
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors
from lightning_merge.utilities.batches import TaskBatches
from lightning_merge.utilities.linalg import paths_taken
from lightning_merge.utilities.processes import Processes
from lightning_merge.utilities.workers import one_thread


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
    allow_strangers: bool = False,
    keep_update: bool = False,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    shard_size: int = SHARD_SIZE,
    carry_code: bool = False,
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
        allow_strangers: Merge experts that do not come from this base, without a word about it, see
            :mod:`lightning_merge.merging.origins`.
        keep_update: Keep the update in memory, in the precision of the arithmetic, for ``Merged.rescaled``.
        output: Write the merged model to this file or folder while it is computed, instead of holding it in memory;
            ``weights`` then reads it from there. See :meth:`Merged.save` for the kinds of files.
        resume: Go on where an earlier run of the same merge into the same output was interrupted, and keep what is
            finished, in a folder ``.OUTPUT.….part``, if this one is. Without it nothing is left of a merge that fails.
        shard_size: The most bytes of one file where the output is a folder; a larger model is divided.
        carry_code: Whether an output that is a folder gets the code (``*.py``) beside the base's weights, too.
        distributed: Share the parameters with the other processes of the default process group (torchrun, Lightning's
            ddp, SLURM); all of them must make the same call, and see the same files. The result is the same for any
            number of processes, and all of them return it.

    Returns:
        The merged model.

    Raises:
        MergeError: If the models do not fit together, hold values that are not finite, or cannot be read or written; if
            an expert does not come from this base.
    """
    options = MergeOptions(
        statistics=statistics,
        module=module,
        data=data,
        scale=scale,
        include=include,
        exclude=exclude,
        matrices=matrices,
        dtype=dtype,
        device=device,
        seed=seed,
        workers=workers,
        allow_non_finite=allow_non_finite,
        allow_strangers=allow_strangers,
        keep_update=keep_update,
        output=output,
        resume=resume,
        shard_size=shard_size,
        carry_code=carry_code,
        distributed=distributed,
    )
    processes = Processes(distributed)
    inputs = open_inputs(base, experts, options.scaled(method), options, processes)
    values = inspect_inputs(inputs, options, processes)
    merged, computation = _prepare(inputs, values, options, processes)
    return _compute(merged, computation, inputs.home, options, processes)


def _prepare(inputs: Inputs, values: Values, options: MergeOptions, processes: Processes) -> tuple[Merged, Computation]:
    """Have the method look at the whole model once.

    Returns:
        The merged model, still without weights, and what computes them.
    """
    method, base, experts, inventory = inputs.method, inputs.base, inputs.experts, inputs.inventory
    with processes.together():
        task_vectors = ExpertTaskVectors(
            base,
            list(experts.values()),
            inventory.merged,
            options.dtype or (torch.float64 if values.large else precision_of(method, base, experts.values())),
            inputs.device,
            options.rule,
            options.seed,
            statistics=inputs.statistics,
            tasks=task_data_of(inputs, options) if method.needs_data else None,
            infinite=values.infinite,
        )
        with paths_taken() as paths, nullcontext() if method.needs_data else one_thread(), in_sentences(method):
            survey = method.survey(task_vectors)
        manifest = make_manifest(
            method,
            options.settings(inputs.device),
            base,
            experts,
            dict(zip(experts, inputs.statistics, strict=False)),
        )
    updates: dict[str, Tensor] | None = {} if options.keep_update else None
    computation = Computation(
        method, base, experts, task_vectors, survey, inventory, inputs.workers, updates, options.allow_non_finite
    )
    headers = [base.header, next(iter(experts.values())).header]
    hyper_parameters, beside = keep_beside(headers, getattr(options.module, "hparams", None))
    merged = Merged(
        weights={},
        base=base,
        inventory=inventory,
        manifest=manifest,
        experts=experts,
        hyper_parameters=hyper_parameters,
        beside=beside,
        origins=inputs.origins,
        notes=tuple(notes_on_contents([base, *experts.values()], beside, options.output)),
        paths=paths,
        computation=computation if method.per_task or options.keep_update else None,
    )
    return merged, computation


def _compute(
    merged: Merged, computation: Computation, home: torch.device, options: MergeOptions, processes: Processes
) -> Merged:
    """Compute every parameter of the merged model, into memory or into the output."""
    with paths_taken(merged.paths):
        if options.output is None:
            return replace(merged, weights={**_in_memory(computation, home, processes), **merged.beside.state})
        _to_disk(merged, computation, options.output, options, processes)
    written = open_weights(options.output, "the merged model")
    state = merged.beside.state
    return replace(merged, weights=ChainMap(dict(state), cast(Any, written)) if state else written)


def _in_memory(computation: Computation, home: torch.device, processes: Processes) -> dict[str, Tensor]:
    """Compute all parameters of the merged model; every process computes a part of them and gets the others."""
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
    options: MergeOptions,
    processes: Processes,
) -> None:
    """Write every parameter of the merged model as soon as it is computed; every process writes a part of them."""
    model = merged.writer(output, resume=options.resume, shard_size=options.shard_size, carry_code=options.carry_code)
    with model.open(processes):
        missing = [name for name in merged.inventory.stored if name not in model.done]
        computation.each(processes.share(missing, computation.cost)[processes.rank], model.write)
        _check_unchanged(computation)


def _check_unchanged(computation: Computation) -> None:
    """Check that no file was changed while it was merged."""
    for weights in (computation.base, *computation.experts.values()):
        weights.check_unchanged()
