"""The base class of callbacks that evaluate other weights next to the module's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_merge.callbacks.merging_callback import MergingCallback
from torch import Tensor

from lightning_merge.evaluation.beside.beside import Beside, tensors_of
from lightning_merge.evaluation.beside.repeats import check_enough, loaders_of
from lightning_merge.evaluation.beside.snapshot import Snapshot
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.processes import processes_of_run


class BesideCallback(MergingCallback, ABC):
    """Callback that evaluates other weights of the module on its own data and logs ``ROW/NAME`` for each.

    ``NAME`` is whatever the module logs by epoch, in its ``validation_step`` or ``test_step`` and the hooks around it.
    The weights are asked for when the first batch is there: by then every callback has put into the module what it is
    evaluated with (``WeightAveraging``: the average).
    """

    _beside: Beside | None = None

    @abstractmethod
    def evaluates(self, trainer: Trainer) -> bool:
        """Tell whether to evaluate anything in the evaluation that a trainer is in."""

    @abstractmethod
    def candidates(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, Mapping[str, Tensor]]:
        """Return, by row, all weights ``(…)`` of the module under their plain names; all processes call it."""

    def after(self, rows: dict[str, dict[str, float]]) -> None:
        """Take the measured values, by row and name."""

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note in ``setup`` to look at the module and its data before every evaluation that is to come.

        Raises:
            MergeError: If the module draws its batches by itself, or holds what cannot be put back after an evaluation.
        """
        for step in (pl_module.validation_step, pl_module.test_step):
            if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
                raise MergeError(
                    f"{type(self).__name__} reads the data for several models, and {type(pl_module).__name__} draws "
                    f"its batches by itself; let {step.__name__} take a batch, and not a dataloader_iter."
                )
        Snapshot(pl_module, [], tensors_of(pl_module).values())
        loop = trainer._evaluation_loop
        reset = loop.reset  # it draws the first random numbers

        def look_and_reset() -> None:
            self._beside = Beside(trainer, pl_module, processes_of_run()) if self.evaluates(trainer) else None
            reset()

        vars(loop)["reset"] = look_and_reset

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before the first batch that there is a sample for every process."""
        if self._beside is not None:
            check_enough(loaders_of(trainer), type(self).__name__)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int | None = None,
    ) -> None:
        """Ask for the other weights at the first batch."""
        if self._beside is not None and not self._beside.has_candidates:
            with isolate_rng(), torch.inference_mode(False):
                self._beside.take(self.candidates(trainer, pl_module))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the other weights, and log the measured values."""
        beside, self._beside = self._beside, None
        if beside is None or not beside.has_candidates:
            return
        rows = beside.evaluate()
        for row, values in rows.items():
            for name, value in values.items():  # all processes have the same values, whose maximum is exact
                pl_module.log(f"{row}/{name}", value, reduce_fx="max", sync_dist=True, add_dataloader_idx=False)
        self.after(rows)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before the first batch of a test that there is a sample for every process."""
        self.on_validation_start(trainer, pl_module)

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int | None = None,
    ) -> None:
        """Ask for the other weights at the first batch of a test."""
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the other weights in a test, and log the measured values."""
        self.on_validation_epoch_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer's loop as it was."""
        self._beside = None
        if trainer.state.fn in (TrainerFn.FITTING, TrainerFn.VALIDATING, TrainerFn.TESTING):
            vars(trainer._evaluation_loop).pop("reset", None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the trainer's loop as it was."""
        self.teardown(trainer, pl_module, "")
