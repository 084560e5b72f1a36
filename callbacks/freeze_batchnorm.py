"""Keep BatchNorm's running statistics as they were before the fit."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.modules.batchnorm import _BatchNorm


class FreezeBatchNorm(Callback):
    """Callback that trains with BatchNorm in evaluation mode, so that all experts share the base's running statistics.

    Scale and shift of the layers are still trained.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Put every BatchNorm layer into evaluation mode."""
        self._set_mode(pl_module, training=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put every BatchNorm layer back into training mode."""
        self._set_mode(pl_module, training=True)

    @staticmethod
    def _set_mode(pl_module: LightningModule, training: bool) -> None:
        for module in pl_module.modules():
            if isinstance(module, _BatchNorm):
                module.train(training)
