"""The project's own module."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F


class SmallNet(LightningModule):
    """A small convolutional network.

    Args:
        width: Channels of the first layer.
        learning_rate: Adam's.
        start: A checkpoint to start from.
    """

    def __init__(self, width: int = 16, learning_rate: float = 3e-3, start: str | None = None):
        super().__init__()
        self.save_hyperparameters()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Linear(32 * width, 10)
        if start is not None:
            self.load_state_dict(torch.load(start, weights_only=True)["state_dict"])

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 8, 8)."""
        return self.head(self.features(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def _evaluate(self, batch: tuple[Tensor, Tensor], name: str) -> None:
        images, labels = batch
        correct = (self(images).argmax(dim=1) == labels).float().mean()
        self.log(name, correct, prog_bar=True, batch_size=len(labels), on_epoch=True, sync_dist=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The accuracy on the validation images."""
        self._evaluate(batch, "val_accuracy")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The accuracy on the test images."""
        self._evaluate(batch, "test_accuracy")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)
