"""The project's own Trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class ProjectTrainer(Trainer):
    """A Trainer that puts every run into a folder of its own.

    Args:
        name: What the run is called; its checkpoint is ``runs/NAME/best.ckpt``.
        kwargs: Lightning's arguments.
    """

    def __init__(self, name: str = "unnamed", **kwargs: Any):
        folder = f"runs/{name}"
        kwargs["default_root_dir"] = folder
        if kwargs.get("enable_checkpointing") is not False:
            best = ModelCheckpoint(dirpath=folder, filename="best", monitor="val_accuracy", mode="max")
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), best]
        super().__init__(**kwargs)
        self.name = name
