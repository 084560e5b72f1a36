"""Merge the model that was just fitted with earlier experts."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning_merge.callbacks.merging_callback import MergingCallback, makes_layers_late
from torch import Tensor

from lightning_merge.checkpoints import check_output, checkpoint_of, open_weights, save_checkpoint
from lightning_merge.checkpoints.contents import Beside, split_source
from lightning_merge.checkpoints.remote import is_there
from lightning_merge.merging.merged import Merged
from lightning_merge.methods import SCORE, MergeMethod
from lightning_merge.models.fitted import (
    Which,
    check_readable,
    check_which,
    check_whole,
    fitted_weights,
    misses_last,
    trial_batches,
)
from lightning_merge.utilities.errors import MergeError, problems_of, raise_all
from lightning_merge.utilities.modules import extra_state
from lightning_merge.utilities.processes import processes_of_run


class MergeAfterFit(MergingCallback):
    """Merge of this run's model with experts of earlier runs into one checkpoint, at the end of ``fit``.

    ``trainer.test(model, ckpt_path=callback.output)`` and the module's ``load_from_checkpoint`` take the result. What
    this run keeps to itself (an excluded head) is this run's in it. Nothing is merged after a fit that was interrupted
    or has failed. With ``fast_dev_run`` everything is checked and the last weights are merged in memory, but nothing is
    written; methods that need statistics, which are beside a checkpoint, are only checked then.

    Args:
        base: The checkpoint that all experts started from.
        experts: The checkpoints (run folders, adapters, task vectors) of the earlier experts: a list, or a mapping from
            a name.
        method: The merging method; SCORE by default.
        methods: Several methods by name instead, for a candidate of each.
        output: The file to write, a ``.ckpt``. With several methods the name of each stands where it says ``{method}``,
            else at its end: ``merged-TIES.ckpt``.
        checkpoint: Which weights of this run are merged. ``best``: those that a ``ModelCheckpoint`` with a monitored
            metric chose. ``last``: the last ones. ``average``: the running average of Lightning's ``WeightAveraging``
            or ``EMAWeightAveraging``. By default the best where a metric is monitored, else the last.
        options: As in :class:`MergingCallback`.

    Attributes:
        outputs: The file of every method.
    """

    def __init__(
        self,
        base: str,
        experts: list[str] | dict[str, str],
        method: MergeMethod | None = None,
        methods: dict[str, MergeMethod] | None = None,
        output: str = "merged.ckpt",
        checkpoint: Which | None = None,
        **options: Any,
    ) -> None:
        super().__init__(base, experts, **options)
        if method is not None and methods:
            raise MergeError("MergeAfterFit has one method or several methods; leave `method` or `methods` out.")
        method = method or SCORE()
        self.methods = methods or {type(method).__name__: method}
        self.checkpoint = checkpoint
        self.outputs = _outputs(output, list(self.methods))

    @property
    def output(self) -> str:
        """The file, if there is only one method.

        Raises:
            MergeError: If there are several.
        """
        if len(self.outputs) > 1:
            raise MergeError(f"There are several outputs: {', '.join(self.outputs.values())}; see `outputs`.")
        return next(iter(self.outputs.values()))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before the fit, and not after it, that the merge can work."""
        if stage != "fit":
            return
        check_whole(trainer, type(self).__name__)
        check_readable(trainer, pl_module, type(self).__name__)
        check_which(trainer, self.checkpoint, type(self).__name__)
        self._check_recorded(trainer)
        self._check_outputs()
        if not makes_layers_late(pl_module):
            self.check(trainer, pl_module, self.methods, with_run=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the merge with a module that has made its layers only now."""
        if makes_layers_late(pl_module):
            self.check(trainer, pl_module, self.methods, with_run=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge on all ranks, write on rank zero; all ranks wait for the files, and fail if one of them fails."""
        if trainer.interrupted:
            return
        which = "last" if trial_batches(trainer) else self.checkpoint
        run = partial(fitted_weights, trainer, pl_module, which, self.name)
        for name, method in self.methods.items():
            if trial_batches(trainer) and method.needs:
                continue
            weights, merged = self.merge(trainer, pl_module, method, run)
            with processes_of_run().together():
                if merged is not None and trainer.is_global_zero:
                    self._warn_of_run(merged)
                if merged is not None and trainer.is_global_zero and not trial_batches(trainer):
                    _save(trainer, pl_module, weights, merged, self.outputs[name])

    def _warn_of_run(self, merged: Merged) -> None:
        """Warn where this run's model does not come from the base; of the others the check before the fit has told."""
        said = merged.origins and merged.origins.only(self.name).warning()
        if said and not self.options["allow_strangers"]:
            warnings.warn(said, stacklevel=2)

    def _check_recorded(self, trainer: Trainer) -> None:
        """Raise a :class:`MergeError` if the statistics of this run will be those of other weights than are merged."""
        needed = self.name not in (self.options["statistics"] or {}) and any(m.needs for m in self.methods.values())
        monitored = not problems_of(check_which, trainer, "best", type(self).__name__)
        if needed and monitored and self.checkpoint in ("last", "average"):
            raise MergeError(
                f"RecordStatistics records the statistics of the best checkpoint where a metric is monitored, and "
                f"MergeAfterFit is asked for the {self.checkpoint}; ask for the best, or take the monitor out."
            )
        if needed and not monitored and misses_last(trainer):
            raise MergeError(
                "MergeAfterFit merges the last weights by their statistics, which RecordStatistics writes beside a "
                f"checkpoint of them, and no ModelCheckpoint is written after the last of {trainer.max_epochs} epochs; "
                "choose max_epochs or the checkpoint's every_n_epochs so that one is."
            )

    def _check_outputs(self) -> None:
        processes = processes_of_run()
        with processes.together():
            if processes.is_first:
                experts = self.experts.values() if isinstance(self.experts, dict) else self.experts
                sources = [open_weights(path) for path in (self.base, *experts) if is_there(split_source(path)[0])]
                raise_all([text for path in self.outputs.values() for text in problems_of(check_output, path, sources)])


def _outputs(output: str, methods: list[str]) -> dict[str, str]:
    """Return the file of every method."""
    path = Path(output)
    if path.suffix != ".ckpt":
        raise MergeError(f"MergeAfterFit writes a checkpoint of Lightning; end the output {output} in .ckpt.")
    strange = [name for name in methods if Path(name).name != name]
    if strange:
        raise MergeError(f"The method's name {strange[0]!r} cannot be part of a file's name; choose another one.")
    if len(methods) > 1 and "{method}" not in output:
        output = f"{output.removesuffix('.ckpt')}-{{method}}.ckpt"
    return {name: output.replace("{method}", name) for name in methods}


def _save(trainer: Trainer, pl_module: LightningModule, weights: dict[str, Tensor], merged: Merged, path: str) -> None:
    """Write a checkpoint that the module, and the data module, load as one of their own."""
    datamodule: LightningDataModule | None = getattr(trainer, "datamodule", None)
    check_output(path, [merged.base, *merged.experts.values()])
    stored = {key: tensor.detach().cpu() for key, tensor in weights.items()}
    keys = {}
    for source in (pl_module, datamodule):
        if source is not None and hasattr(source, "_hparams_name"):
            keys[source.CHECKPOINT_HYPER_PARAMS_NAME] = source._hparams_name  # how load_from_checkpoint passes them
    if datamodule is not None and datamodule.hparams:
        keys[datamodule.CHECKPOINT_HYPER_PARAMS_KEY] = dict(datamodule.hparams)
    content = checkpoint_of(stored, pl_module.hparams, merged.manifest, Beside(keys, extra_state(pl_module)))
    pl_module.on_save_checkpoint(content)
    save_checkpoint(path, content)
