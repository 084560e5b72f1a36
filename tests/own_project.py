"""A Lightning project of somebody else: a module with its own losses and metrics, and its loaders."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_merge as lm


class Classifier(LightningModule):
    """Logs plain tensors, a torchmetrics object, and what it has gathered by the end of the epoch."""

    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(dropout), nn.ReLU())
        self.head = nn.Linear(width, 3)
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 4)`` to logits ``(N, 3)``."""
        return self.head(self.net(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        x, labels = batch
        logits = self(x)
        self.accuracy(logits, labels)
        self.seen.append(logits)
        self.log(f"{split}/accuracy", self.accuracy)
        self.log(f"{split}/loss", F.cross_entropy(logits, labels), prog_bar=True, on_step=True, on_epoch=True)
        self.log_dict({f"{split}/largest": logits.max()}, reduce_fx="max")
        self.log(f"{split}/labels", labels.sum().float(), reduce_fx="sum")

    def validation_step(self, batch, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self.log("val/batches", float(len(self.seen)))
        self.seen.clear()

    def on_test_epoch_end(self) -> None:
        self.seen.clear()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def data(n: int = 23, seed: int = 0) -> TensorDataset:
    """Samples ``(4,)`` of three classes."""
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 4, generator=draw), torch.randint(0, 3, (n,), generator=draw))


def loader(n: int = 23, batch_size: int = 4, seed: int = 0, **arguments) -> DataLoader:
    """Batches of them, in order."""
    return DataLoader(data(n, seed), batch_size=batch_size, **arguments)


def quiet(**arguments) -> Trainer:
    """Lightning's own Trainer, on CPU, that shows and writes nothing."""
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_epochs": 2}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**settings | arguments)


def processes(count: int) -> dict:
    """Arguments of a Trainer that runs on so many processes."""
    return {"devices": count, "strategy": "ddp_fork" if count > 1 else "auto"}


def plain(logged: dict[str, float]) -> dict[str, float]:
    """Names as the module gives them: Lightning adds ``_epoch`` to what is logged by step as well."""
    return {name.replace("_epoch", ""): value for name, value in logged.items()}


def weights(seed: int) -> dict[str, Tensor]:
    """Weights of a classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier().state_dict()


def save(*seeds: int) -> dict[str, str]:
    """Write ``SEED.ckpt`` for every seed."""
    for seed in seeds:
        lm.save_weights(f"{seed}.ckpt", weights(seed))
    return {f"row {seed}": f"{seed}.ckpt" for seed in seeds}
