"""Record what the data of an expert say about its parameters, for the methods that weigh experts by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_merge.checkpoints import check_output, open_weights, statistics_file
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.checkpoints.views import Completed
from lightning_merge.data.each_once import each_once
from lightning_merge.evaluation.statistics.collect import Kind, Recipe
from lightning_merge.evaluation.statistics.record import record, statistics_batches
from lightning_merge.models.fitted import (
    best_checkpoint,
    check_forward,
    check_readable,
    check_whole,
    last_checkpoint,
    trial_batches,
)
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.processes import processes_of_run


class RecordStatistics(Callback):
    """Recorder of the statistics that Fisher, RegMean, MaTS and TACT need, in a file beside the checkpoint.

    At the end of ``fit`` they are those of the checkpoint that a ``ModelCheckpoint`` with a monitored metric chose,
    else of the last one, else of the last weights; in ``trainer.validate`` those of the weights that are validated.
    Weights, modes and random numbers stay as they are.

    The data are read once more, in order, every sample once, and every process takes its part, so that the numbers do
    not depend on the number of processes (but with ``batches``, or ``fisher="batch"``, where a batch has less than two
    samples for each of them). This package's data modules have a ``statistics_dataloader()``: the training
    samples without augmentation. Of any other project's loaders the samples are taken with the augmentation that they
    have; streams and batches of the project's own making are read as each process gets them.

    With ``fast_dev_run`` everything is tried on as many batches as that asks for, and nothing is written.

    Args:
        kinds: ``fisher``: the diagonal Fisher information of every parameter (for ``Fisher``). ``gram``: the Gram
            matrix of the inputs of every linear layer (for ``RegMean``). ``gram_out``: that of the gradients at its
            outputs (with ``gram`` for ``MaTS``). ``moments``: mean and variance of every channel of the activations
            that TACT corrects (for ``repair.by=tact`` with ``repair.recorded``).
        batches: How many batches, in the loader's order of samples; by default all.
        fisher: ``example``: the mean of the squared gradients of single examples. ``batch``: of the gradients of
            batches' means, faster and cruder.
        labels: ``expected``: the expectation over the model's own predictions. ``true``: the data's labels.
            ``argmax``: the predicted ones.
        output: The file to write; by default ``NAME.statistics.safetensors`` beside the checkpoint ``NAME.ckpt``.
        when: ``fit``: at the end of a fit, over the training data. ``validate``: at the end of ``trainer.validate``,
            over the validation data.
    """

    def __init__(
        self,
        kinds: Sequence[Kind] = ("fisher", "gram"),
        batches: int | None = None,
        fisher: Literal["example", "batch"] = "example",
        labels: Literal["expected", "true", "argmax"] = "expected",
        output: str | None = None,
        when: Literal["fit", "validate"] = "fit",
    ) -> None:
        if when not in ("fit", "validate"):
            raise MergeError(f"RecordStatistics: when must be fit or validate, got {when!r}.")
        self.recipe = Recipe(tuple(kinds), fisher, labels, batches)
        self.output = output
        self.when = when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run at whose end the statistics could not be written."""
        if stage != self.when:
            return
        check_whole(trainer, "RecordStatistics")
        check_forward(pl_module, "RecordStatistics")
        if stage == "fit":
            check_readable(trainer, pl_module, "RecordStatistics")
        with processes_of_run().together():
            if trial_batches(trainer):
                return
            if self.output is not None:
                check_output(self.output)
            elif stage == "fit" and trainer.checkpoint_callback is None:
                raise MergeError("RecordStatistics: no checkpoint is written, beside which to write; give output=….")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before the fit that its data can be read."""
        if self.when == "fit":
            self._training_batches(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect over the training data."""
        if self.when == "fit":
            checkpoint = best_checkpoint(trainer) or last_checkpoint(trainer)
            self._record(trainer, pl_module, self._training_batches(trainer), checkpoint)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to validate weights that are of no checkpoint, unless ``output`` says where to write."""
        nowhere = self.output is None and trainer.ckpt_path is None and not trial_batches(trainer)
        if self._is_validated(trainer) and nowhere:
            raise MergeError(
                "RecordStatistics: the weights are of no checkpoint, beside which to write; give "
                "validate(ckpt_path=…), or output=…."
            )

    def _is_validated(self, trainer: Trainer) -> bool:
        """Tell whether this is a validation to record in, not one within a fit."""
        return self.when == "validate" and trainer.state.fn == "validate"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect over the validation data."""
        if self._is_validated(trainer):
            with isolate_rng(), processes_of_run().together():
                batches = each_once(trainer.val_dataloaders)
            self._record(trainer, pl_module, batches, trainer.ckpt_path)

    @staticmethod
    def _training_batches(trainer: Trainer) -> Iterable[Any]:
        with isolate_rng(), processes_of_run().together():
            return statistics_batches(getattr(trainer, "datamodule", None), trainer.train_dataloader)

    def _record(
        self, trainer: Trainer, pl_module: LightningModule, batches: Iterable[Any], checkpoint: str | Path | None
    ) -> None:
        processes, expert, path = processes_of_run(), None, None
        with processes.together():
            if processes.is_first:  # a checkpoint may be on its disk alone
                running = open_weights(pl_module.state_dict())
                expert = running if checkpoint is None else open_weights(checkpoint)
                if any(name not in expert for name in running):
                    expert = Completed(expert, running)  # a checkpoint may leave out what is frozen
                path = local_path(self.output) if self.output is not None else statistics_file(expert)
                if path is None and not trial_batches(trainer):
                    raise MergeError(
                        "RecordStatistics: the fit has written no checkpoint, beside which to write; give output=…."
                    )
        recipe = self.recipe
        if most := trial_batches(trainer):
            path, recipe = None, replace(recipe, batches=min(most, recipe.batches or most))
        record(trainer, pl_module, batches, expert, recipe, path)
