"""The weights that a fit has left: best, last or averaged."""

from __future__ import annotations

import io
import pickle
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_merge.checkpoints import Weights, open_weights
from lightning_merge.utilities.errors import MergeError

Which = Literal["best", "last", "average"]
"""What a fit leaves: the checkpoint that a monitored metric chose, the last weights, or their running average."""


def check_whole(trainer: Trainer, who: str) -> None:
    """Raise a :class:`MergeError` where no process has the whole model.

    Args:
        trainer: The running trainer.
        who: What needs it, for the message.
    """
    if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
        raise MergeError(
            f"{who} needs the whole model on every process, and {type(trainer.strategy).__name__} divides it; use "
            "strategy ddp, or take the callback out and give the consolidated checkpoint to `lightning-merge` after "
            "the fit."
        )


def check_readable(trainer: Trainer, module: LightningModule, who: str) -> None:
    """Raise a :class:`MergeError` before a fit whose checkpoints could not be read without running code.

    Args:
        trainer: The trainer of the fit.
        module: Its module.
        who: What reads a checkpoint at the end, for the message.
    """
    owners = (module, getattr(trainer, "datamodule", None)) if model_checkpoints(trainer) else ()
    stored = {key: value for owner in owners for key, value in getattr(owner, "hparams", {}).items()}
    if wrong := [key for key, value in stored.items() if not _is_plain(value)]:
        kinds = ", ".join(f"{key} is a {type(stored[key]).__name__}" for key in wrong)
        raise MergeError(
            f"{who} reads a checkpoint of this run at its end, and with these hyper-parameters none can be loaded "
            f"without running code: {kinds}. Give plain values, or self.save_hyperparameters(ignore={wrong})."
        )


def _is_plain(value: Any) -> bool:
    """Tell whether a value in a checkpoint can be read again, or is not written at all."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
    except Exception:  # of any class: Lightning leaves out what cannot be pickled
        return True
    file.seek(0)
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


def check_forward(module: LightningModule, who: str) -> None:
    """Raise a :class:`MergeError` if a module has no ``forward``.

    Args:
        module: The module.
        who: What calls it, for the message.
    """
    if not is_overridden("forward", module) and "forward" not in vars(module):
        raise MergeError(
            f"{who} runs the model by calling it, and {type(module).__name__} has no forward(); let forward(self, x) "
            "return the logits."
        )


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a trainer, in the order of their calls."""
    return trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it from outside of the class


def trial_batches(trainer: Trainer) -> int:
    """Return the number of batches of a ``fast_dev_run``; 0 in a run that is none."""
    return int(trainer.fast_dev_run)  # type: ignore[attr-defined]  # Lightning sets it from outside of the class


def average_callback(trainer: Trainer) -> Callback | None:
    """Find Lightning's WeightAveraging (or EMAWeightAveraging) in this trainer; None if there is none."""
    names = ("WeightAveraging",)  # by name: Lightning has it since 2.6
    for callback in callbacks_of(trainer):
        if any(cls.__name__ in names and cls.__module__.startswith("lightning") for cls in type(callback).__mro__):
            return callback
    return None


def best_checkpoint(trainer: Trainer) -> str | None:
    """Find the checkpoint that a ``ModelCheckpoint`` chose by a monitored metric; None where none was monitored."""
    return next((c.best_model_path for c in model_checkpoints(trainer) if c.monitor and c.best_model_path), None)


def last_checkpoint(trainer: Trainer) -> str | None:
    """Find the checkpoint that a ``ModelCheckpoint`` has written last, whatever the metric; None if there is none."""
    paths = [c.last_model_path or ("" if c.monitor else c.best_model_path) for c in model_checkpoints(trainer)]
    return next((path for path in paths if path), None)


def model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """Return the callbacks that write checkpoints to files of their own."""
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def misses_last(trainer: Trainer) -> bool:
    """Tell whether it is certain before a fit that no ``ModelCheckpoint`` will hold its last weights."""
    epochs, checkpoints = trainer.max_epochs or -1, model_checkpoints(trainer)
    if epochs < 0 or trainer.max_steps != -1 or trainer.early_stopping_callbacks or trial_batches(trainer):
        return False

    def skips(checkpoint: ModelCheckpoint) -> bool:
        every = checkpoint._every_n_epochs  # 0: it goes by steps or minutes
        return not checkpoint.save_last and (checkpoint.save_top_k == 0 or bool(every and epochs % every))

    return bool(checkpoints) and all(map(skips, checkpoints))


def check_which(trainer: Trainer, which: Which | None, who: str) -> None:
    """Raise a :class:`MergeError` before the fit if it will not leave the weights that are asked for."""
    if which == "best" and not any(callback.monitor for callback in model_checkpoints(trainer)):
        raise MergeError(
            f"{who} is asked for the best checkpoint, and no ModelCheckpoint monitors a metric; add "
            "ModelCheckpoint(monitor=…), or ask for the last."
        )
    if which == "average" and average_callback(trainer) is None:
        raise MergeError(
            f"{who} is asked for the average of the weights, and nothing averages them; add Lightning's "
            "WeightAveraging or EMAWeightAveraging, or ask for the last."
        )


def fitted_weights(trainer: Trainer, module: LightningModule, which: Which | None, name: str = "this run") -> Weights:
    """Open the weights that a fit leaves at its end (``on_fit_end``), from a checkpoint where one holds them.

    In a run with ``WeightAveraging`` the module holds the average by then, and so does every checkpoint.

    Args:
        trainer: The trainer of the fit.
        module: Its module.
        which: By default the best where a metric is monitored, else the last.
        name: What to call the weights in messages.
    """
    best = best_checkpoint(trainer) if which in (None, "best") else None
    if best is not None:
        return open_weights(best, name)
    if which == "best":
        raise MergeError("The fit has written no checkpoint by a monitored metric, so that none is the best.")
    weights, last = open_weights(module.state_dict(), name), last_checkpoint(trainer)
    written = open_weights(last, name) if last is not None else weights
    return written if written is weights or written.digest() == weights.digest() else weights
