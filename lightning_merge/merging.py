"""Merge experts into one model: ``merge(base, experts, method)``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge import __version__
from lightning_merge.checkpoints import Source, Weights, check_output, open_weights, save_weights
from lightning_merge.errors import MergeError, raise_all
from lightning_merge.folders import check_folder, is_folder, save_folder
from lightning_merge.lora import open_expert
from lightning_merge.matrices import Matrices
from lightning_merge.methods import Context, MergeMethod
from lightning_merge.statistics import open_statistics
from lightning_merge.task_data import Data, TaskData, check_task_data
from lightning_merge.task_vectors import Inventory, TaskVectors, find_non_finite, take_inventory, wide

Experts = Sequence[Source] | Mapping[str, Source]
"""The experts: a sequence of sources, or a mapping from the expert's name to its source."""


@dataclass(frozen=True)
class Merged:
    """One model made of several.

    Args:
        weights: The merged parameters and buffers, in the dtype and on the device of the base.
        base: What the experts were merged onto.
        inventory: What happened to every parameter.
        manifest: Method, arguments, versions, and the sha256 of every file that went in.
        experts: The experts by name, for what they keep to themselves.
        hyper_parameters: The arguments of the base's LightningModule (else the first expert's), if its file has them.
    """

    weights: dict[str, Tensor]
    base: Weights
    inventory: Inventory
    manifest: dict[str, Any]
    experts: dict[str, Weights]
    hyper_parameters: dict[str, Any]
    _task_parameters: Callable[[int], dict[str, Tensor]] | None = field(default=None, repr=False)
    _rescaled: Callable[[Merged, float], Merged] | None = field(default=None, repr=False)

    def for_task(self, expert: str) -> dict[str, Tensor]:
        """Return the model for one expert's task.

        That is the merged model with the expert's own excluded parameters (its head), and, where the method keeps a
        model for each task, with its update for this task.

        Raises:
            MergeError: If there is no such expert.
        """
        if expert not in self.experts:
            raise MergeError(f"There is no expert {expert!r}; the experts are {', '.join(self.experts)}.")
        source = self.experts[expert]
        own = self._task_parameters(list(self.experts).index(expert)) if self._task_parameters else {}
        return self.weights | own | {name: source[name].clone() for name in self.inventory.private[source.name]}

    def rescaled(self, scale: float) -> Merged:
        """Return the same merge with another scaling coefficient, bit for bit, without merging again.

        Raises:
            MergeError: If the update was not kept.
        """
        if self._rescaled is None:
            raise MergeError("The update of this merge is gone; keep it with merge(…, keep_update=True) to rescale it.")
        return self._rescaled(self, scale)

    def summary(self) -> str:
        """What was merged, in one line."""
        found = self.inventory
        parts = [f"{len(found.merged)} parameters merged"]
        for names, what in (
            (found.averaged, "running statistics averaged"),
            (found.copied, "copied from the base"),
            (found.tied, "tied"),
        ):
            parts += [f"{len(names)} {what}"] if names else []
        method = self.manifest["method"]["class_path"]
        count = f"{len(self.experts)} expert{'' if len(self.experts) == 1 else 's'}"
        return f"{method} of {count} ({', '.join(self.experts)}): {', '.join(parts)}"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the merged model.

        Args:
            path: A file, see :func:`lightning_merge.checkpoints.save_weights`, or, without a suffix, a folder as
                Hugging Face writes them, see :func:`lightning_merge.folders.save_folder`.
        """
        if is_folder(path):
            return save_folder(path, self.weights, self.base.path, self.manifest)
        return save_weights(path, self.weights, hyper_parameters=self.hyper_parameters, manifest=self.manifest)


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
    if workers < 1:
        raise MergeError(f"workers must be at least 1, got {workers}.")
    if dtype not in (None, torch.float32, torch.float64):
        raise MergeError(f"The arithmetic can be float32 or float64, not {dtype}.")
    origin = open_weights(base, name="base")
    sources = open_experts(experts, origin)
    if output is not None and is_folder(output):
        check_folder(output, origin.path)
    elif output is not None:
        check_output(output, inputs=[origin, *sources.values()])
    inventory = take_inventory(origin, list(sources.values()), include, exclude)
    if method.max_experts is not None and len(sources) > method.max_experts:
        raise MergeError(
            f"{type(method).__name__} merges at most {method.max_experts} experts, and {len(sources)} are given."
        )
    if method.needs_data:
        check_task_data(type(method).__name__, module, data, origin, sources, inventory)
    measured = open_statistics(statistics, method.needs, origin, sources, inventory.merged)
    if not allow_non_finite:
        floating = [*inventory.merged, *inventory.averaged]
        keys = [f"{kind}.{name}" for kind in method.needs for name in inventory.merged]
        models = {"the base": origin} | {f"the expert {name}": expert for name, expert in sources.items()}
        raise_all(
            find_non_finite(models, floating) + find_non_finite({source.name: source for source in measured}, keys)
        )

    kept = keep(origin, sources, inventory)
    tasks = None
    if method.needs_data:
        double = any(origin.meta[name].dtype == torch.float64 for name in inventory.merged)
        tasks = TaskData(module, data, kept, sources, inventory, torch.float64 if double else torch.float32, seed)
    matrices = matrices or Matrices()
    task_vectors = TaskVectors(
        origin,
        list(sources.values()),
        inventory.merged,
        dtype or _precision(method, origin),
        device,
        matrices,
        seed,
        statistics=measured,
        tasks=tasks,
    )
    survey = method.survey(task_vectors)
    updates: dict[str, Tensor] = {}

    def parameters(scale: float, update: Callable[[Context], Tensor]) -> dict[str, Tensor]:
        def parameter(name: str) -> Tensor:
            context = task_vectors.context(name, survey)
            return (context.base + scale * update(context)).to(origin[name])

        with ThreadPoolExecutor(workers) as pool:
            runs = [copy_context().run for _ in inventory.merged]  # threads see what the caller has set
            tensors = pool.map(lambda run, name: run(parameter, name), runs, inventory.merged)
            found = dict(zip(inventory.merged, tensors, strict=True))
        return found | {alias: found[owner] for alias, owner in inventory.tied.items() if owner in found}

    def update(context: Context) -> Tensor:
        found = method.update(task_vectors[context.name], context)
        if keep_update:
            updates[context.name] = found
        return found

    def task_parameters(scale: float, expert: int) -> dict[str, Tensor]:
        return parameters(scale, lambda context: method.task_update(task_vectors[context.name], expert, context))

    def rescaled(merged: Merged, scale: float) -> Merged:
        return replace(
            merged,
            weights=merged.weights | parameters(scale, lambda context: updates[context.name]),
            manifest=merged.manifest | {"method": replace(method, scale=scale).describe()},
            _task_parameters=partial(task_parameters, scale) if method.per_task else None,
        )

    weights = parameters(method.scale, update) | kept
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
        _task_parameters=partial(task_parameters, method.scale) if method.per_task else None,
        _rescaled=rescaled if keep_update else None,
    )
    if output is not None:
        merged.save(output)
    return merged


def _precision(method: MergeMethod, base: Weights) -> torch.dtype:
    """The precision of the arithmetic: the method's, or float64 where the weights are."""
    dtypes = {tensor.dtype for tensor in base.meta.values()}
    return torch.float64 if torch.float64 in dtypes else method.dtype


def keep(base: Weights, experts: Mapping[str, Weights], inventory: Inventory) -> dict[str, Tensor]:
    """What the merged model has beside the merged parameters: the mean of running statistics, copies of the base's."""
    means = {}
    for name in inventory.averaged:
        copies = [wide(expert[name]).to(base[name].device) for expert in experts.values()]
        means[name] = torch.stack(copies).mean(dim=0).to(base[name])
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
