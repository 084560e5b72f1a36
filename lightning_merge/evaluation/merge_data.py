"""What methods that run the model while they merge are given, where there is a data module."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning_merge.errors import MergeError
from lightning_merge.methods import MergeMethod

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from lightning_merge.data import DomainDataModule
    from lightning_merge.trainer import MergeTrainer


def module_and_data(
    trainer: MergeTrainer,
    model: LightningModule | None,
    datamodule: DomainDataModule | None,
    method: MergeMethod,
    experts: Iterable[str],
) -> dict[str, Any]:
    """The ``module`` and ``data`` for :func:`lightning_merge.merge`; nothing where the method does not need them.

    The data of an expert are the training images of the domain that it is named after, and their labels are not looked
    at. No other domain is read, so that a domain that is left out of a merge stays unseen.

    Args:
        trainer: The model is run on its device.
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
    unknown = [name for name in experts if name not in datamodule.domains]
    if unknown:
        raise MergeError(
            f"{type(method).__name__} reads images of every expert's domain, and there is no domain {unknown[0]!r}; "
            f"name the experts after their domains ({', '.join(datamodule.domains)}), as in --experts '{{"
            f"{datamodule.domains[0]}: PATH, …}}'."
        )
    device = trainer.strategy.root_device
    module = model if model.device == device else copy.deepcopy(model).to(device)
    return {"module": module, "data": datamodule.training_images(experts, model)}
