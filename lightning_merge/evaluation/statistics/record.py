"""Record the statistics of an expert's data next to its checkpoint, with Lightning, on any number of processes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_merge import __version__
from lightning_merge.checkpoints import Weights
from lightning_merge.checkpoints.statistics_files import save_statistics
from lightning_merge.data.each_once import each_once
from lightning_merge.evaluation.repeatable_trainer import RepeatableTrainer
from lightning_merge.evaluation.statistics.collect import Recipe, StatisticsCollector
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.processes import processes_of_run


def statistics_batches(datamodule: LightningDataModule | None, loaders: Any = None) -> Iterable[Any]:
    """Return the training data to collect statistics over, every sample once.

    That is the data module's ``statistics_dataloader()`` where it has one (a
    :class:`lightning_merge.data.DomainDataModule` has one without augmentation), else the samples of its
    ``train_dataloader()``, with whatever augmentation they have.

    Args:
        datamodule: The data module, if there is one.
        loaders: The training loaders, if they have been made already.
    """
    make_loader = getattr(datamodule, "statistics_dataloader", None)
    if make_loader is not None:
        return make_loader()
    if loaders is None:
        loaders = cast(LightningDataModule, datamodule).train_dataloader()  # one of the two is given
    return each_once(loaders)


def record(
    trainer: Trainer,
    module: LightningModule,
    batches: Iterable[Any],
    expert: Weights | None,
    recipe: Recipe,
    path: Path | None,
) -> None:
    """Collect the statistics of an expert within a run, in which every process must take part until the end.

    Args:
        trainer: The trainer, which moves batches to the device of this process.
        module: A module that maps inputs to logits; its own weights are not used, and it is unchanged afterwards.
        batches: This process's part of the data: inputs ``(N, …)`` and labels ``(N,)``.
        expert: The weights of the expert; only those of the first process are read.
        recipe: What to collect.
        path: The file that the first process writes; None to write no file.

    Raises:
        MergeError: On every process, if one of them fails.
    """
    processes, device = processes_of_run(), module.device
    first_expert = cast(Weights, expert)  # only the first process reads it, and has it
    with isolate_rng(), torch.inference_mode(False):
        with processes.together():
            tensors = dict(first_expert) if processes.is_first else None
        weights = processes.from_first(tensors)
        try:
            with processes.together():
                module.to(trainer.strategy.root_device)
                collector = StatisticsCollector(module, weights, recipe, processes)
            collector.update_all(_prepared(trainer, batch) for batch in islice(batches, recipe.batches))
            statistics, examples = collector.compute(), collector.num_examples
        finally:
            module.to(device)
        with processes.together():
            if processes.is_first and path is not None:
                about = {"examples": examples, **asdict(recipe), "lightning_merge": __version__}
                save_statistics(path, statistics, first_expert, about)


def _prepared(trainer: Trainer, batch: Any) -> tuple[Tensor, Tensor]:
    """Prepare a batch as Lightning's loops do: inputs ``(N, …)`` and labels ``(N,)`` on this process's device."""
    batch = trainer.lightning_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
    batch = trainer.strategy.batch_to_device(batch)
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise MergeError(f"Statistics need batches of (inputs, labels), two tensors; the data give {type(batch)}.")
    return batch[0], batch[1]


class _Nothing:
    """The only batch of the test loop, which no hook of the data module sees."""


class TrainingData(LightningDataModule):
    """The training data of a data module within Lightning's test loop, which itself is given nothing to test.

    Lightning's calls are passed on to a copy of the data module, which is prepared for a fit.

    Args:
        original: The data module; it is not changed.
    """

    def __init__(self, original: LightningDataModule) -> None:
        super().__init__()
        self.original = copy.copy(original)
        self.prepare_data_per_node = original.prepare_data_per_node

    def prepare_data(self) -> None:
        """Download the data, on one process of each node or one of all."""
        self.original.trainer = self.trainer
        self.original.prepare_data()

    def setup(self, stage: str) -> None:
        """Prepare the data for a fit."""
        self.original.trainer = self.trainer
        self.original.setup("fit")

    def test_dataloader(self) -> DataLoader:
        """Build the loader of the test loop's only batch."""
        samples = cast("Dataset[_Nothing]", [_Nothing()])  # any sequence will do
        return DataLoader(samples, collate_fn=lambda samples: samples[0])

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Apply the data module's own hook to a batch before it is moved."""
        return batch if isinstance(batch, _Nothing) else self.original.on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to a device."""
        if isinstance(batch, _Nothing):
            return batch
        return self.original.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Apply the data module's own hook to a batch on its device."""
        return batch if isinstance(batch, _Nothing) else self.original.on_after_batch_transfer(batch, dataloader_idx)

    def on_exception(self, exception: BaseException) -> None:
        """Clean up after an error."""
        self.original.on_exception(exception)

    def teardown(self, stage: str) -> None:
        """Clean up after the run."""
        self.original.teardown(stage)


class StatisticsRecorder(LightningModule):
    """Recorder of statistics at the start of Lightning's test loop, whose own data do not matter.

    Args:
        module: A module that maps inputs to logits; its own weights are not used.
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
        """The preprocessing of the module's backbone, for which the data module asks."""
        return getattr(self.module, "preprocessing", None)

    def on_test_start(self) -> None:
        """Collect the statistics and write the file."""
        with processes_of_run().together():
            data: TrainingData = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning does not declare it
            batches = statistics_batches(data.original)
        record(self.trainer, self.module, batches, self._expert, self._recipe, self._path)

    def test_step(self, batch: _Nothing, batch_idx: int) -> None:
        """Do nothing; everything has been done before."""


def record_statistics(
    trainer: RepeatableTrainer,
    module: LightningModule,
    datamodule: LightningDataModule,
    expert: Weights,
    recipe: Recipe,
    path: Path,
) -> None:
    """Collect the statistics of an expert on the training data and write them to a file.

    Args:
        trainer: The trainer whose settings are used.
        module: The expert's module; its own weights are not used.
        datamodule: The expert's data, see :func:`statistics_batches`.
        expert: The weights of the expert.
        recipe: What to collect.
        path: The file to write.
    """
    recorder = StatisticsRecorder(module, expert, recipe, path)
    test = trainer.again(inference_mode=False).test
    with isolate_rng():
        test(recorder, datamodule=TrainingData(datamodule), verbose=False)
