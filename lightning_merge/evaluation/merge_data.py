"""Module and images for methods and repairs that run the model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_merge.data import DomainDataModule
from lightning_merge.methods import MergeMethod
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.modules import device_of


def module_and_data(
    trainer: Trainer,
    model: LightningModule | None,
    datamodule: DomainDataModule | None,
    method: MergeMethod,
    experts: Iterable[str],
) -> dict[str, Any]:
    """Build the arguments ``module`` and ``data`` of :func:`lightning_merge.merge`, empty if the method needs no data.

    An expert's data are the training images of the domain that it is named after, without their labels. No other domain
    is read, so that a domain that is left out of a merge stays unseen.

    Args:
        trainer: The trainer on whose device the model is run.
        model: The experts' module.
        datamodule: The data.
        method: The merging method.
        experts: The names of the experts.

    Raises:
        MergeError: If an expert is not named after a domain.
    """
    if not method.needs_data or model is None or datamodule is None:
        return {}
    experts = list(experts)
    check_named_after_domains(type(method).__name__, datamodule, experts)
    return {"module": on_device(trainer, model), "data": datamodule.training_images(experts, model)}


def check_named_after_domains(who: str, datamodule: DomainDataModule, experts: Sequence[str]) -> None:
    """Raise a :class:`MergeError` if the data of an expert cannot be found by its name."""
    unknown = [name for name in experts if name not in datamodule.domains]
    if unknown:
        raise MergeError(
            f"{who} reads images of every expert's domain, and there is no domain {unknown[0]!r}; "
            f"name the experts after their domains ({', '.join(datamodule.domains)}), as in --experts '{{"
            f"{datamodule.domains[0]}: PATH, …}}'."
        )


def calibration_images(
    who: str,
    datamodule: DomainDataModule,
    experts: Sequence[str],
    model: LightningModule,
    batches: int,
    batch_size: int,
) -> dict[str, list[Any]]:
    """Read a few batches of training images ``(N, …)`` and labels ``(N,)`` per expert, the same on every process.

    Args:
        who: Name of what needs them, for error messages.
        datamodule: The data module that holds the domains.
        experts: The experts, which are named after their domains.
        model: The model that the images are prepared for.
        batches: Maximum number of batches per domain.
        batch_size: Number of images per batch.
    """
    check_named_after_domains(who, datamodule, experts)
    loaders = datamodule.training_images(experts, model, batch_size)
    return {name: list(islice(loader, batches)) for name, loader in loaders.items()}


def on_device(trainer: Trainer, model: LightningModule) -> LightningModule:
    """Return the model on the trainer's device: itself if it is already there, else a copy."""
    device = trainer.strategy.root_device
    return model if device_of(model) == device else copy.deepcopy(model).to(device)
