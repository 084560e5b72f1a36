"""Merge experts when a run is set up, and put the merged weights into its module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning_merge.callbacks.merging_callback import MergingCallback

from lightning_merge.methods import SCORE, MergeMethod
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.modules import extra_state
from lightning_merge.utilities.processes import processes_of_run

Stage = Literal["fit", "validate", "test", "predict"]


class MergeAtSetup(MergingCallback):
    """Merge of experts in ``setup``, so that a run starts from the merged model, on every rank, with nothing on disk.

    The module must have made its layers in ``__init__``. In ``fit``, if that is among the stages, training starts from
    the merged model; a fit that is resumed from a checkpoint goes on from that checkpoint.

    Args:
        base: The checkpoint that all experts started from.
        experts: The checkpoints (run folders, adapters, task vectors) of the experts: a list, or a mapping from a name.
        method: The merging method; SCORE by default.
        stages: When to merge; in other stages the module stays what it is.
        options: As in :class:`MergingCallback`.
    """

    def __init__(
        self,
        base: str,
        experts: list[str] | dict[str, str],
        method: MergeMethod | None = None,
        stages: Sequence[Stage] = ("validate", "test", "predict"),
        **options: Any,
    ) -> None:
        super().__init__(base, experts, **options)
        self.method = method or SCORE()
        self.stages = tuple(stages)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Merge the experts and load the result into the module."""
        if stage not in self.stages:
            return
        self.check(trainer, pl_module, {type(self.method).__name__: self.method}, with_run=False)
        weights, _ = self.merge(trainer, pl_module, self.method)
        with processes_of_run().together():
            pl_module.load_state_dict({**extra_state(pl_module), **weights})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that a validation runs the merged model."""
        if trainer.state.fn == "validate":
            self._check_no_checkpoint(trainer, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that a test runs the merged model."""
        self._check_no_checkpoint(trainer, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that a prediction runs the merged model."""
        self._check_no_checkpoint(trainer, "predict")

    def _check_no_checkpoint(self, trainer: Trainer, stage: Stage) -> None:
        """Raise a :class:`MergeError` where Lightning has put a checkpoint over the merged model after ``setup``."""
        if stage in self.stages and trainer.ckpt_path:
            raise MergeError(
                f"MergeAtSetup has merged into the model, and Lightning has put the checkpoint {trainer.ckpt_path} "
                f"over it; call trainer.{stage}(model) with the model, whose absence after a fit means the best "
                "checkpoint, and without ckpt_path, or take the callback out."
            )
