"""A small Lightning project of somebody else: own module, own data, plain Trainer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_merge as lm

fork = pytest.mark.skipif(os.name != "posix", reason="no fork")


def make_net(width: int = 6) -> nn.Sequential:
    """A network with BatchNorm."""
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 5))


class Project(LightningModule):
    """Keeps its network as ``self.net`` and a head of its own beside it."""

    def __init__(self, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = make_net(width)
        self.head = nn.Linear(5, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.net(inputs))

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self._loss(batch))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test/loss", self._loss(batch))

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    """Twenty-three random samples, of three classes."""

    def _loader(self) -> DataLoader:
        draw = torch.Generator().manual_seed(1)
        samples = torch.randn(23, 4, generator=draw), torch.randint(3, (23,), generator=draw)
        return DataLoader(TensorDataset(*samples), batch_size=4)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


def moved(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Weights, each moved a little; running variances stay positive."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.1 * torch.rand(tensor.shape, generator=draw) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }


def write_models(part: str = "", suffix: str = "ckpt") -> Project:
    """Write ``base`` and two experts, or a part of them, and return the module that starts from the base."""
    torch.manual_seed(0)
    project = Project()
    weights = project.get_submodule(part).state_dict()
    lm.save_weights(f"base.{suffix}", weights)
    for i in range(2):
        lm.save_weights(f"expert{i}.{suffix}", moved(weights, i))
    return project


def make_trainer(*callbacks, **arguments) -> Trainer:
    """A quiet trainer of few steps."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1, "max_epochs": 2}
    return Trainer(callbacks=list(callbacks), **{**quiet, **arguments})


def read(path: str | Path) -> dict[str, Tensor]:
    """All weights of a file."""
    return dict(lm.open_weights(path))
