"""Record the statistics of an expert's data beside its checkpoint, with Lightning, on any number of processes."""

from __future__ import annotations

import copy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_merge import __version__
from lightning_merge.checkpoints import Weights
from lightning_merge.collect_statistics import Recipe, StatisticsCollector
from lightning_merge.errors import MergeError
from lightning_merge.statistics import save_statistics

if TYPE_CHECKING:
    from lightning_merge.trainer import MergeTrainer


def statistics_dataloader(datamodule: LightningDataModule) -> DataLoader:
    """The training data to collect statistics over.

    That is the data module's ``statistics_dataloader()`` where it has one (a
    :class:`lightning_merge.data.DomainDataModule` has one without augmentation), else its ``train_dataloader()``, with
    whatever augmentation that has.
    """
    return getattr(datamodule, "statistics_dataloader", datamodule.train_dataloader)()


def new_collector(trainer: Trainer, module: LightningModule, expert: Weights, recipe: Recipe) -> StatisticsCollector:
    """A collector that adds up over the trainer's processes."""
    return StatisticsCollector(module, expert, recipe, reduce=partial(trainer.strategy.reduce, reduce_op="sum"))


def save_collected(trainer: Trainer, collector: StatisticsCollector, expert: Weights, path: Path) -> None:
    """Write what was collected, on rank zero; every process must take part, and returns when the file is there."""
    statistics, examples = collector.compute(), collector.num_examples
    if trainer.is_global_zero:
        about = {"examples": examples, **asdict(collector.recipe), "lightning_merge": __version__}
        save_statistics(path, statistics, expert, about)
    trainer.strategy.barrier()


def split_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """The inputs and labels of a batch."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise MergeError(f"Statistics need batches of (inputs, labels), two tensors; the data give {type(batch)}.")
    return batch[0], batch[1]


class StatisticsRecorder(LightningModule):
    """Collects statistics in Lightning's test loop and writes them when it ends.

    Args:
        module: Maps inputs to logits; its own weights are not used.
        expert: The weights of the expert.
        recipe: What to collect.
        path: The file to write.
    """

    def __init__(self, module: LightningModule, expert: Weights, recipe: Recipe, path: Path) -> None:
        super().__init__()
        self.module = module
        self._expert, self._recipe, self._path = expert, recipe, path

    @property
    def preprocessing(self) -> Any:
        """The preprocessing of the module's backbone, which the data module asks for."""
        return getattr(self.module, "preprocessing", None)

    def on_test_start(self) -> None:
        """Start from nothing."""
        self._collector = new_collector(self.trainer, self.module, self._expert, self._recipe)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add one batch."""
        self._collector.update(*split_batch(batch))

    def on_test_end(self) -> None:
        """Write the file."""
        save_collected(self.trainer, self._collector, self._expert, self._path)


def record_statistics(
    trainer: MergeTrainer,
    module: LightningModule,
    datamodule: LightningDataModule,
    expert: Weights,
    recipe: Recipe,
    path: Path,
) -> None:
    """Collect the statistics of an expert on the training data and write them to a file.

    Args:
        trainer: Its settings are used for one pass in the test loop.
        module: The expert's module; its own weights are not used.
        datamodule: The expert's data, see :func:`statistics_dataloader`.
        expert: The weights of the expert.
        recipe: What to collect.
        path: The file to write.
    """
    with isolate_rng():
        recorder = StatisticsRecorder(module, expert, recipe, path)
        test = trainer.again(inference_mode=False, limit_test_batches=recipe.batches or 1.0).test
        test(recorder, datamodule=_training_data_as_test_data(datamodule), verbose=False)


def _training_data_as_test_data(datamodule: LightningDataModule) -> LightningDataModule:
    class TrainingData(type(datamodule)):  # type: ignore[misc]
        def setup(self, stage: str) -> None:
            super().setup("fit")

        def test_dataloader(self) -> DataLoader:
            return statistics_dataloader(self)

    other = copy.copy(datamodule)
    other.__class__ = TrainingData
    return other
