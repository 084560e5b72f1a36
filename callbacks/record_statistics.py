"""Record what the data of an expert say about its parameters, for the methods that weigh experts by it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_merge.checkpoints import open_weights
from lightning_merge.collect_statistics import Kind, Recipe
from lightning_merge.errors import MergeError
from lightning_merge.recording import (
    new_collector,
    save_collected,
    split_batch,
    statistics_dataloader,
)
from lightning_merge.statistics import statistics_file
from lightning_merge.trainers import best_checkpoint, check_whole, last_checkpoint


class RecordStatistics(Callback):
    """At the end of ``fit``, collect the statistics that Fisher, RegMean and MaTS need, beside the checkpoint.

    They are those of the checkpoint that a ``ModelCheckpoint`` with a monitored metric chose, else of the last one,
    else of the last weights. Weights, modes and random numbers stay as they are.

    Every process takes its part of the data. This package's data modules have a ``statistics_dataloader()``: the
    training samples without augmentation, each once. Of any other data module the training loader is used as it is,
    with its augmentation; the sampler that Lightning puts into it counts a few samples twice where their number is no
    multiple of the number of processes.

    Args:
        kinds: ``fisher``: the diagonal Fisher information of every parameter (for ``Fisher``). ``gram``: the Gram
            matrix of the inputs of every linear layer (for ``RegMean``). ``gram_out``: that of the gradients at its
            outputs (with ``gram`` for ``MaTS``).
        batches: How many batches; by default all.
        fisher: ``example``: the mean of the squared gradients of single examples. ``batch``: of the gradients of
            batches' means, faster and cruder.
        labels: ``expected``: the expectation over the model's own predictions. ``true``: the data's labels.
            ``argmax``: the predicted ones.
        output: The file to write; by default ``NAME.statistics.safetensors`` beside the checkpoint ``NAME.ckpt``.
    """

    def __init__(
        self,
        kinds: Sequence[Kind] = ("fisher", "gram"),
        batches: int | None = None,
        fisher: Literal["example", "batch"] = "example",
        labels: Literal["expected", "true", "argmax"] = "expected",
        output: str | None = None,
    ) -> None:
        self.recipe = Recipe(tuple(kinds), fisher, labels, batches)
        self.output = output

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before the fit what cannot work after it."""
        if stage != "fit":
            return
        check_whole(trainer, "RecordStatistics")
        if self.output is None and trainer.checkpoint_callback is None:
            raise MergeError("RecordStatistics: no checkpoint is written, beside which to write; give output=….")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect on every process, write on rank zero; every rank waits for the file."""
        checkpoint = best_checkpoint(trainer) or last_checkpoint(trainer)
        expert = open_weights(pl_module.state_dict() if checkpoint is None else checkpoint)
        path = Path(self.output) if self.output is not None else statistics_file(expert)
        if path is None:
            raise MergeError(
                "RecordStatistics: the fit has written no checkpoint, beside which to write; give output=…."
            )
        datamodule = getattr(trainer, "datamodule", None)
        device = pl_module.device
        with isolate_rng():
            pl_module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU by now
            collector = new_collector(trainer, pl_module, expert, self.recipe)
            loader = trainer.train_dataloader if datamodule is None else statistics_dataloader(datamodule)
            for batch in islice(loader, self.recipe.batches):
                batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
                collector.update(*split_batch(batch))
            save_collected(trainer, collector, expert, path)
            pl_module.to(device)
