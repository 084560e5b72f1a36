"""The project's own data: scikit-learn's digits, as several scanners see them."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset, TensorDataset

SCANNERS = {
    "plain": lambda images: images,
    "grey": lambda images: 0.5 * images + 0.4,
    "shifted": lambda images: images.roll((1, 1), dims=(-2, -1)),
}


class ScannedDigits(LightningDataModule):
    """Digits of one scanner, or of all.

    Args:
        scanner: Which one.
        batch_size: Images of a batch.
    """

    def __init__(self, scanner: Literal["plain", "grey", "shifted", "all"] = "all", batch_size: int = 64):
        super().__init__()
        self.scanners = list(SCANNERS) if scanner == "all" else [scanner]
        self.batch_size = batch_size

    def _images(self, part: slice) -> Dataset:
        images, labels = load_digits(return_X_y=True)
        images = torch.tensor(images[part], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        seen = torch.cat([SCANNERS[scanner](images) for scanner in self.scanners])
        return TensorDataset(seen, torch.tensor(labels[part]).repeat(len(self.scanners)))

    def train_dataloader(self) -> DataLoader:
        """The first 1,000 digits."""
        return DataLoader(self._images(slice(0, 1000)), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """The next 300."""
        return DataLoader(self._images(slice(1000, 1300)), self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """The last 497."""
        return DataLoader(self._images(slice(1300, None)), self.batch_size)
