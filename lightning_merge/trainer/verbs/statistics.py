"""The verb ``statistics``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.pytorch import LightningDataModule, LightningModule

from lightning_merge.checkpoints import open_weights, statistics_file
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.checkpoints.task_vector_files import is_task_vector
from lightning_merge.evaluation.candidates import check_fit
from lightning_merge.evaluation.statistics.collect import Kind, Recipe
from lightning_merge.evaluation.statistics.record import record_statistics
from lightning_merge.trainer.verbs.reporting import ReportingTrainer
from lightning_merge.utilities.errors import MergeError


class StatisticsVerb(ReportingTrainer):
    """The verb ``statistics``."""

    def statistics(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        expert: str | None = None,
        kinds: list[Kind] = ["fisher", "gram"],  # noqa: B006, not changed
        batches: int | None = None,
        fisher: Literal["example", "batch"] = "example",
        labels: Literal["expected", "true", "argmax"] = "expected",
        output: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Path:
        """Collect what an expert's training data say about it, for Fisher, RegMean, MaTS and TACT.

        Args:
            model: The expert's module; its own weights are not used.
            datamodule: The expert's data; its training data are used, without augmentation where it knows how.
            expert: The expert's checkpoint or run folder.
            kinds: ``fisher``: the diagonal Fisher information of every parameter (for Fisher). ``gram``: the Gram
                matrix of the inputs of every linear layer (for RegMean). ``gram_out``: that of the gradients at its
                outputs (with ``gram`` for MaTS). ``moments``: mean and variance of every channel of the activations
                that TACT corrects (for ``merge`` with repair.by=tact and repair.recorded).
            batches: How many batches; by default all.
            fisher: ``example``: the mean of the squared gradients of single examples. ``batch``: of the gradients of
                batches' means, faster and cruder.
            labels: ``expected``: the expectation over the model's own predictions. ``true``: the data's labels.
                ``argmax``: the predicted ones.
            output: The file to write; by default NAME.statistics.safetensors beside the checkpoint NAME.ckpt, where
                the verb ``merge`` finds it.
            ckpt_path: Not used; here so that the config.yaml of a fit can be read.
            weights_only: Not used; checkpoints are never unpickled beyond weights.

        Returns:
            The file that was written.
        """
        if model is None or datamodule is None or expert is None:
            raise MergeError(
                "Statistics need an expert, its model and its data; give --expert, and the config.yaml of its fit."
            )
        if is_task_vector(expert):
            raise MergeError(
                f"{expert} is a task vector; collect the statistics of the checkpoint that it was taken from: beside "
                "that they are found for both."
            )
        weights = open_weights(expert)
        check_fit(model, {expert: weights})
        recipe = Recipe(tuple(kinds), fisher, labels, batches)
        path = local_path(output) if output is not None else statistics_file(weights)
        assert path is not None  # the expert is a file
        self.recorded = path
        record_statistics(self, model, datamodule, weights, recipe, path)
        return path
