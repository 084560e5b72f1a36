"""The models of tasks that do not share their classes: one body, and a head for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_merge.checkpoints.names import matches
from lightning_merge.data import DomainDataModule
from lightning_merge.evaluation.candidates import Record, check_classes
from lightning_merge.evaluation.held_out import BASE, evaluate_domain
from lightning_merge.evaluation.repeatable_trainer import RepeatableTrainer
from lightning_merge.merging.merged import Merged
from lightning_merge.merging.repairing import ALL_TASKS
from lightning_merge.models.rebuilding import accepted_arguments, build_again
from lightning_merge.repair import Correction, fold, insert
from lightning_merge.repair.corrections import state_of
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.modules import extra_state, stored_tensors

_TASK_KNOWN = "merged, task known"


def model_of_task(
    model: LightningModule, datamodule: DomainDataModule, task: str, hparams: Mapping[str, Any] | None = None
) -> LightningModule:
    """Build a model like another one, with weights of its own and a head for the classes of a task.

    Args:
        model: The other one.
        datamodule: The data module, which knows the classes of the task.
        task: The task.
        hparams: Hyper-parameters that differ.

    Raises:
        MergeError: If the task has another number of classes and the model does not take ``num_classes``.
    """
    accepted = accepted_arguments(model)
    classes = datamodule.class_names_of(task)
    changes: dict[str, Any] = {}
    if "num_classes" in accepted:
        changes = {"num_classes": len(classes)}
        changes |= {name: None for name in ("class_names", "weights") if name in accepted}
    elif len(classes) != len(datamodule.class_names_of(datamodule.domains[0])):
        raise MergeError(
            f"{type(model).__name__} takes no num_classes, so that it cannot have a head for the {len(classes)} "
            f"classes of {task!r}; let its constructor take num_classes."
        )
    return build_again(model, {**changes, **(hparams or {})})


def start_from(model: LightningModule, weights: Mapping[str, Tensor], private: Sequence[str]) -> None:
    """Load another model's weights into a model, except for its private ones (the head), which stay as they are.

    Args:
        model: The model that is changed.
        weights: The weights ``(…)`` of the other model, which has the same body, by name.
        private: Shell patterns of the parameters that are left alone.
    """
    state = stored_tensors(model)
    mixed = {name: tensor if matches(name, private) else weights[name] for name, tensor in state.items()}
    model.load_state_dict({**extra_state(model), **mixed})


def evaluate_merged(
    trainer: RepeatableTrainer,
    model: LightningModule,
    datamodule: DomainDataModule,
    base: Mapping[str, Tensor],
    merged: Merged,
) -> list[Record]:
    """Evaluate a merged model on the test domains, and what it is for a task on those that experts are named after.

    Args:
        trainer: The trainer whose settings are used.
        model: The experts' module.
        datamodule: The data.
        base: The weights ``(…)`` that the experts were merged onto, by name.
        merged: The merged model.

    Returns:
        A record for the rows ``base`` and ``merged``, and for ``merged, task known`` where the model for the task is
        another one. Where the experts keep their heads to themselves, only that one says something about their tasks.
    """
    records = []
    for domain in datamodule.test_domains:
        is_task = domain in merged.experts
        if not (is_task and any(merged.inventory.private.values())):
            correction = merged.corrections.get(ALL_TASKS, Correction())
            rows = {BASE: {**state_of(model, correction.identity()), **base}, "merged": merged.weights}
            corrected = cast(LightningModule, insert(model, correction))
            records += evaluate_domain(trainer, corrected, datamodule, domain, rows, {})
        if is_task and merged.knows_tasks:
            weights = merged.for_task(domain)
            fits = _fits(model, weights) and _has_classes(model, datamodule.class_names_of(domain))
            task_model = model if fits else model_of_task(model, datamodule, domain)
            correction = unfolded(task_model, merged, domain, weights)
            corrected = cast(LightningModule, insert(task_model, correction))
            records += evaluate_domain(trainer, corrected, datamodule, domain, {_TASK_KNOWN: weights}, {})
    return records


def unfolded(model: LightningModule, merged: Merged, task: str, weights: Mapping[str, Tensor]) -> Correction:
    """Return the corrections of a task that its weights ``(…)`` cannot hold, to be inserted into the module."""
    correction = merged.corrections.get(task) or merged.corrections.get(ALL_TASKS, Correction())
    return fold(model, weights, correction)[1]


def _has_classes(model: LightningModule, names: Sequence[str]) -> bool:
    """Tell whether a model accepts classes of these names."""
    try:
        check_classes(model, names)
    except MergeError:
        return False
    return True


def _fits(model: LightningModule, weights: Mapping[str, Tensor]) -> bool:
    """Tell whether weights ``(…)`` have the shapes of the model's."""
    return all(weights[name].shape == tensor.shape for name, tensor in stored_tensors(model).items())
