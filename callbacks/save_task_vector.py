"""Save only what a fit has changed of its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_merge.callbacks.merging_callback import makes_layers_late

from lightning_merge.checkpoints import TASK_VECTOR, Weights, match_names, open_weights, save_tensors
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.checkpoints.task_vector_files import task_vector_file
from lightning_merge.checkpoints.task_vector_writing import check_task_vector, take_task_vector
from lightning_merge.models.fitted import (
    Which,
    check_readable,
    check_which,
    check_whole,
    fitted_weights,
    model_checkpoints,
    trial_batches,
)
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.processes import processes_of_run


class SaveTaskVector(Callback):
    """Writer of this run's task vector at the end of ``fit``: the difference of its model to the base, nothing else.

    The file is an expert wherever experts are given, over this very base: ``lightning-merge merge --base BASE --experts
    '[NAME.task_vector.safetensors]'`` (with ``--method TaskArithmetic --method.scale 1`` it gives the model back). Its
    header holds the base's sha256, so that it is refused over another one. Without ``rank`` and ``dtype`` it is as
    large as the parameters that were trained, and the merged parameters are to the same bits those of the checkpoint.

    The first process writes, and the others wait. In a ``fast_dev_run`` the difference is taken and nothing is written;
    nor is anything after a fit that was interrupted.

    Args:
        base: The checkpoint that the fit started from.
        output: The file to write; by default ``NAME.task_vector.safetensors`` beside the checkpoint ``NAME.ckpt``, or
            ``last.task_vector.safetensors`` beside it where no checkpoint holds the weights in question.
        rank: Truncate the difference of every matrix and convolution kernel to this rank, where that is smaller.
        dtype: The precision in which differences are stored; by default that of the weights, at least float32.
        checkpoint: Of which weights: the ``best`` by a monitored metric, the ``last``, or their running ``average``; by
            default the best where a metric is monitored, else the last.
        exclude: Shell patterns of parameters that are left out.

    Attributes:
        path: The file that was written last; None before.
    """

    def __init__(
        self,
        base: str,
        output: str | None = None,
        rank: int | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        checkpoint: Which | None = None,
        exclude: list[str] | None = None,
    ) -> None:
        self.base = base
        self.output = output
        self.rank = rank
        self.dtype = None if dtype is None else getattr(torch, dtype)
        self.checkpoint = checkpoint
        self.exclude = exclude or []
        self.path: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a fit after which the file could not be written."""
        if stage != "fit":
            return
        check_whole(trainer, "SaveTaskVector")
        check_readable(trainer, pl_module, "SaveTaskVector")
        check_which(trainer, self.checkpoint, "SaveTaskVector")
        with processes_of_run().together():
            if self.output is None and not model_checkpoints(trainer) and not trial_batches(trainer):
                raise MergeError("SaveTaskVector: no ModelCheckpoint is there, beside which to write; give output=….")
        if not makes_layers_late(pl_module):
            self._check(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check a module that has made its layers only now."""
        if makes_layers_late(pl_module):
            self._check(pl_module)

    def _check(self, pl_module: LightningModule) -> None:
        processes = processes_of_run()
        with processes.together():
            if processes.is_first:
                output = None if self.output is None else local_path(self.output)
                base, run = self._models(open_weights(pl_module.state_dict(), "this run"))
                check_task_vector(output, base, run, *self._how)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, on the first process."""
        processes, written = processes_of_run(), None
        with processes.together():
            if processes.is_first:
                which = None if trial_batches(trainer) else self.checkpoint
                base, fitted = self._models(fitted_weights(trainer, pl_module, which))
                tensors, about = take_task_vector(base, fitted, *self._how)
                if not trial_batches(trainer):
                    written = self._output(trainer, fitted)
                    save_tensors(written, tensors, {TASK_VECTOR: json.dumps(about)})
        self.path = processes.gather(written)[0]

    @property
    def _how(self) -> tuple[int | None, torch.dtype | None, list[str]]:
        return self.rank, self.dtype, self.exclude

    def _models(self, run: Weights) -> tuple[Weights, Weights]:
        """Open the base; return it, and this run's model under its names."""
        base = open_weights(self.base, "base")
        return base, match_names(base, run)

    def _output(self, trainer: Trainer, fitted: Weights) -> Path:
        """Name the file to write: what was asked for, else beside the checkpoint of the weights or the last one."""
        if self.output is not None:
            return local_path(self.output)
        if fitted.path is not None:
            return task_vector_file(fitted.path)
        checkpoint = model_checkpoints(trainer)[0]  # `setup` has made sure that there is one
        return task_vector_file(local_path(checkpoint.dirpath or trainer.default_root_dir) / "last.ckpt")
