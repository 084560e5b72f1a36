"""Build a LightningModule again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule


def rebuild(model: LightningModule, hparams: Mapping[str, Any]) -> LightningModule:
    """The same model with other hyper-parameters, and the same weights."""
    accepted = inspect.signature(type(model).__init__).parameters
    arguments = {name: value for name, value in model.hparams.items() if name in accepted}
    rebuilt = type(model)(**{**arguments, **hparams})
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt
