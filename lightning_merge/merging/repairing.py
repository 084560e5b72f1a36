"""Repair a merged model on data: the section ``repair`` of a merge, and what it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args, get_type_hints

from torch import Tensor, nn

from lightning_merge.merging.merged import Merged
from lightning_merge.merging.recorded_moments import read_moments
from lightning_merge.merging.repair_result import Change, RepairResult
from lightning_merge.methods import MergeMethod
from lightning_merge.repair import Correction, Pool, corrected_weights, fold, probe_head, reestimate_batch_norm, tact
from lightning_merge.repair import repair as shared_repair
from lightning_merge.repair.calibration import Known
from lightning_merge.repair.tact import OWN_DATA
from lightning_merge.utilities.batches import TaskBatches, data_problems
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.processes import Processes
from lightning_merge.utilities.tensors import is_finite

ALL_TASKS = "all tasks"
"""The name of a correction that serves every task."""


@dataclass(frozen=True)
class Repair:
    """Options of the repair of a merged model.

    Args:
        by: ``tact``: the activations of every task, towards those of its expert. ``repair``: those of all tasks in one
            way, towards the mean over the experts (REPAIR). ``batch_norm``: only the running statistics of BatchNorm.
            ``probe``: the head of every task, trained anew on the merged model's features; needs labels.
        batches: The most batches of each task's training images.
        max_gain: The most that a channel is scaled by.
        recorded: Take the activations of every expert from the file of statistics beside its checkpoint (kind
            ``moments`` of ``RecordStatistics`` and of the verb ``statistics``), instead of running it over its images;
            ``tact`` only. The merged model is still run over them.
        sites: The activations that are corrected, by name; by default they are found in the model.
    """

    by: Literal["tact", "repair", "batch_norm", "probe"] = "tact"
    batches: int = 16
    max_gain: float = 10.0
    recorded: bool = False
    sites: Sequence[str] | None = None

    def problems(self) -> list[str]:
        """Check the values; return what is wrong, a sentence each."""
        kinds = get_args(get_type_hints(Repair)["by"])
        problems = [] if self.by in kinds else [f"repair.by must be one of {', '.join(kinds)}, got {self.by!r}."]
        problems += [] if self.batches >= 1 else [f"repair.batches must be at least 1, got {self.batches}."]
        if self.recorded and self.by != "tact":
            problems.append(
                f"repair.recorded: recorded moments are of each expert's own data, and {self.by} looks at those of all "
                "tasks; use repair.by=tact."
            )
        return problems + ([] if self.max_gain > 0 else [f"repair.max_gain must be positive, got {self.max_gain}."])

    def problems_with(self, method: MergeMethod) -> list[str]:
        """Check that models merged by a method can be repaired like this; return why not, a sentence each."""
        if method.per_task and self.by in ("repair", "batch_norm"):
            name = type(method).__name__
            return [f"{name} keeps a model for each task, which one correction does not fit; use repair.by=tact."]
        return []


def repair(
    options: Repair,
    merged: Merged,
    module: nn.Module,
    data: TaskBatches,
    *,
    seed: int = 0,
    known: dict[Any, Known] | None = None,
    distributed: bool = False,
) -> Merged:
    """Repair a merged model.

    Args:
        options: By which method, and within which limits.
        merged: The merged model; it is not changed.
        module: The module that its weights are of, on the device where it is run.
        data: For each expert's name batches of its images, with labels for ``probe``, that can be read again.
        seed: Of data that are drawn from PyTorch's global generator.
        known: Statistics of the same experts on the same data, where several models are merged of them: what is found
            is added, and what is there is not computed again.
        distributed: Whether all processes of a process group make this call with the same data: they take what the
            first one finds, since rounding may differ with the number of threads.

    Returns:
        The repaired model: its ``weights`` where one correction serves all tasks, its ``for_task`` in any case.

    Raises:
        MergeError: If data are missing or too few, or if there is nothing to repair.
    """
    raise_all([*options.problems(), *data_problems(data, merged.experts, "repair")])
    if merged.repair is not None:
        raise MergeError("This model was repaired already; repair what was merged.")
    if ALL_TASKS in merged.experts:
        raise MergeError(f"No expert can be called {ALL_TASKS!r}, which a correction of all of them is; rename it.")
    if merged.computation is not None:
        raise_all(options.problems_with(merged.computation.method))
    processes = Processes(distributed)
    with processes.together():
        repairs = _repairs(options, merged, module, data, seed, known)
    repairs = processes.gather(repairs)[0]
    if options.by == "tact":
        changes = {
            task: _finite(partial(corrected_weights, module, correction=correction))
            for task, correction in repairs.items()
        }
        return replace(merged, repair=RepairResult(changes, corrections=repairs))
    if options.by == "probe":
        changes = {task: _finite(partial(_replaced, renewed=head)) for task, head in repairs.items()}
        return replace(merged, repair=RepairResult(changes, heads=repairs))
    if options.by == "batch_norm":
        return _for_all_tasks(merged, partial(_replaced, renewed=repairs))
    _, unfolded = fold(module, merged.weights, repairs)
    return _for_all_tasks(merged, partial(corrected_weights, module, correction=repairs), unfolded)


def _repairs(
    options: Repair, merged: Merged, module: nn.Module, data: TaskBatches, seed: int, known: dict[Any, Known] | None
) -> Any:
    """Compute the corrections of the tasks (``tact``) or of all of them, their heads, or BatchNorm's statistics."""
    if options.by == "probe":
        return {
            task: probe_head(module, merged.for_task(task), data[task], batches=options.batches, seed=seed)
            for task in merged.experts
        }
    if options.by == "batch_norm":
        complete = {**next(iter(merged.experts.values())), **merged.weights}
        renewed = reestimate_batch_norm(module, complete, Pool(data), batches=options.batches, seed=seed)
        return {name: tensor for name, tensor in renewed.items() if tensor is not complete[name]}
    moments = None if known is None else known.setdefault((options.batches, *(options.sites or ())), {})
    if options.recorded:
        moments = {(OWN_DATA, task): read_moments(expert, task) for task, expert in merged.experts.items()}
    is_shared = options.by == "repair"
    correct = partial(shared_repair, module, merged.weights) if is_shared else partial(tact, module, merged.for_task)
    return correct(
        merged.experts,
        data,
        sites=options.sites,
        batches=options.batches,
        max_gain=options.max_gain,
        seed=seed,
        known=moments,
    )


def _for_all_tasks(merged: Merged, change: Change, unfolded: Correction | None = None) -> Merged:
    """Repair a model in one way for all tasks; of the corrections, those that its weights do not hold are noted."""
    result = RepairResult(
        changes=dict.fromkeys(merged.experts, _finite(change)),
        unrepaired=merged.weights,
        corrections={ALL_TASKS: unfolded} if unfolded else {},
    )
    return replace(merged, weights=_finite(change)(dict(merged.weights)), repair=result)


def _finite(change: Change) -> Change:
    """Refuse what a change of weights makes of finite numbers, unless it is finite, too."""
    return partial(_changed, change)


def _changed(change: Change, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change weights ``(…)``.

    Raises:
        MergeError: If what was finite is so no more, such as a gain that float16 does not hold; all are listed.
    """
    changed = change(weights)
    raise_all(
        [
            f"{name!r} is not finite any more after the repair, in {tensor.dtype}; give the base in a wider type, or a "
            "smaller repair.max_gain."
            for name, tensor in changed.items()
            if tensor is not weights.get(name)
            and not is_finite(tensor)
            and (name not in weights or is_finite(weights[name]))
        ]
    )
    return changed


def _replaced(weights: Mapping[str, Tensor], renewed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put renewed parameters and buffers ``(…)`` into weights."""
    return {**weights, **renewed}
