"""Count what a model has seen."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class CountSamples(Callback):
    """Log how many images the model has seen."""

    def __init__(self) -> None:
        self.seen = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch."""
        self.seen += len(batch[0])
        pl_module.log("seen", float(self.seen))
