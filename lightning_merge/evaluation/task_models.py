"""The models of tasks that do not share their classes: one body, and a head for each task."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_merge.data import DomainDataModule
from lightning_merge.errors import MergeError
from lightning_merge.matrices import matches


def model_of_task(
    model: LightningModule, datamodule: DomainDataModule, task: str, hparams: Mapping[str, Any] | None = None
) -> LightningModule:
    """Build a model like another one, with weights of its own and a head for the classes of a task.

    Args:
        model: The other one; its class is called again with its ``hparams``.
        datamodule: Says how many classes the task has.
        task: The task.
        hparams: Hyper-parameters that differ.

    Raises:
        MergeError: If the task has another number of classes and the model does not take ``num_classes``.
    """
    accepted = inspect.signature(type(model).__init__).parameters
    arguments = {name: value for name, value in model.hparams.items() if name in accepted}
    classes = datamodule.class_names_of(task)
    if "num_classes" in accepted:
        arguments["num_classes"] = len(classes)
        arguments |= {"class_names": None} if "class_names" in accepted else {}
    elif len(classes) != len(datamodule.class_names_of(datamodule.domains[0])):
        raise MergeError(
            f"{type(model).__name__} takes no num_classes, so that it cannot have a head for the {len(classes)} classes "
            f"of {task!r}; let its constructor take num_classes."
        )
    return type(model)(**{**arguments, **(hparams or {})})


def start_from(model: LightningModule, weights: Mapping[str, Tensor], private: Sequence[str]) -> None:
    """Give a model another one's weights, but for its private ones (the head), which stay as they are.

    Args:
        model: What is changed.
        weights: The weights, of the same body.
        private: Shell patterns of the parameters that are left alone.
    """
    own = model.state_dict()
    taken = {name: tensor if matches(name, private) else weights[name] for name, tensor in own.items()}
    model.load_state_dict(taken)
