"""Merge the model that was just fitted with earlier experts."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_merge.checkpoints import check_output, open_weights
from lightning_merge.errors import MergeError
from lightning_merge.inventory import take_inventory
from lightning_merge.merging import merge
from lightning_merge.methods import SCORE, MergeMethod


class MergeAfterFit(Callback):
    """At the end of ``fit``, merge this run's model with experts of earlier runs into one checkpoint.

    The model is the checkpoint that a ``ModelCheckpoint`` with a monitored metric chose, else the last weights.
    ``trainer.test(ckpt_path=callback.output)`` takes the result.

    Args:
        base: The checkpoint that all experts started from.
        experts: The checkpoints of the earlier experts.
        method: The merging method; SCORE by default.
        output: The file to write.
        exclude: Shell patterns of parameters that are not merged.
    """

    def __init__(
        self,
        base: str,
        experts: list[str],
        method: MergeMethod | None = None,
        output: str = "merged.ckpt",
        exclude: list[str] | None = None,
    ) -> None:
        self.base = base
        self.experts = experts
        self.method = method or SCORE()
        self.output = output
        self.exclude = exclude or []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out before the fit, and not after it, whether the merge can work."""
        if stage != "fit":
            return
        if self.method.needs_data:
            raise MergeError(
                f"MergeAfterFit has no data of the earlier experts, which {type(self.method).__name__} needs; merge "
                "with lightning-merge merge, or choose another method."
            )
        check_output(self.output)
        experts = [open_weights(path) for path in self.experts] + [open_weights(pl_module.state_dict(), "this run")]
        take_inventory(open_weights(self.base), experts, exclude=self.exclude)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge on rank zero; every rank waits for the file."""
        if trainer.is_global_zero:
            experts = {path: open_weights(path) for path in self.experts}
            merged = merge(
                self.base, experts | {"this run": self._this_run(trainer, pl_module)}, self.method, exclude=self.exclude
            )
            merged.hyper_parameters.update(pl_module.hparams)
            merged.save(self.output)
        trainer.strategy.barrier()

    @staticmethod
    def _this_run(trainer: Trainer, pl_module: LightningModule):
        callback = trainer.checkpoint_callback
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            return open_weights(callback.best_model_path, "this run")
        return open_weights(pl_module.state_dict(), "this run")
