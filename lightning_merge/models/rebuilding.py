"""Build a LightningModule again from its hyper-parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule


def build_again(model: LightningModule, changes: Mapping[str, Any]) -> LightningModule:
    """Build a model of the same class with weights of its own.

    Args:
        model: Its class is called again with those of its ``hparams`` that the constructor takes.
        changes: Hyper-parameters that differ.
    """
    accepted = accepted_arguments(model)
    arguments = {name: value for name, value in model.hparams.items() if name in accepted}
    return type(model)(**{**arguments, **changes})


def rebuild(model: LightningModule, changes: Mapping[str, Any]) -> LightningModule:
    """Build a model of the same class with the same weights.

    Args:
        model: The model, see :func:`build_again`.
        changes: Hyper-parameters that differ, none of which changes a shape.
    """
    rebuilt = build_again(model, changes)
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt


def accepted_arguments(model: LightningModule) -> set[str]:
    """Return the names of the arguments that a model's constructor takes."""
    return set(inspect.signature(type(model).__init__).parameters) - {"self"}
