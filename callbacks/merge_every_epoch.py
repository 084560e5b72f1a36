"""Evaluate, at every validation of a fit, the merge of the running weights with the other experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_merge.callbacks.beside_callback import BesideCallback
from torch import Tensor

from lightning_merge.checkpoints import open_weights
from lightning_merge.methods import SCORE, MergeMethod
from lightning_merge.models.fitted import callbacks_of
from lightning_merge.utilities.errors import MergeError


class MergeEveryEpoch(BesideCallback):
    """Merge of the running weights with earlier experts at each validation of a ``fit``, evaluated and logged.

    What the module logs as ``NAME`` is logged for the merged model as ``merged/NAME``, which a ``ModelCheckpoint`` or
    an ``EarlyStopping`` can monitor. In a run with ``WeightAveraging`` it is the average that is merged. The fit itself
    goes on as without this callback: weights, gradients, optimizer and random numbers stay what they are. The merged
    model is evaluated in the module itself, as ``trainer.validate`` would do it, once the validation has read its data,
    which are read again for each method; afterwards the module is as it was.

    Args:
        base: The checkpoint that all experts started from.
        experts: The checkpoints (run folders, adapters, task vectors) of the other experts: a list, or a mapping from a
            name.
        method: The merging method whose results are logged as ``merged/NAME``; SCORE by default.
        methods: Several merging methods instead, by the name under which their results are logged.
        every_n: Merge at each validation, or at every second, third, … (then nothing can monitor the results).
        **options: What :class:`lightning_merge.callbacks.merging_callback.MergingCallback` takes.
    """

    def __init__(
        self,
        base: str,
        experts: list[str] | dict[str, str],
        method: MergeMethod | None = None,
        methods: dict[str, MergeMethod] | None = None,
        every_n: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(base, experts, **options)
        if method is not None and methods:
            raise MergeError("MergeEveryEpoch takes one method, or several by name in methods; leave one of them out.")
        if every_n < 1:
            raise MergeError(
                f"MergeEveryEpoch merges at every n-th validation, and every_n is {every_n}; give 1 or more."
            )
        self.methods: dict[str, MergeMethod] = methods or {"merged": method or SCORE()}
        self.every_n = every_n
        self._validations = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before the fit that the merges can work."""
        if stage == "fit":
            self._check_monitors(trainer)
            self.check(trainer, pl_module, self.methods, with_run=True)
            self.begin(trainer, pl_module)

    def _check_monitors(self, trainer: Trainer) -> None:
        """Raise a :class:`MergeError` if a callback looks for a result before there is one."""
        for callback in callbacks_of(trainer):
            monitor = getattr(callback, "monitor", None) or ""
            if self.every_n > 1 and any(monitor.startswith(f"{row}/") for row in self.methods):
                raise MergeError(
                    f"{type(callback).__name__} monitors {monitor!r} at every validation, and MergeEveryEpoch measures "
                    f"it in one of {self.every_n} only; leave every_n at 1."
                )

    def evaluates(self, trainer: Trainer) -> bool:
        """Tell whether this validation is one of a fit, and one to merge at."""
        in_fit = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        return in_fit and (self._validations + 1) % self.every_n == 0

    def candidates(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, Mapping[str, Tensor]]:
        """Merge by every method; return the weights ``(…)`` by row and name."""
        running = {name: tensor.to("cpu", copy=True) for name, tensor in open_weights(pl_module.state_dict()).items()}
        run = open_weights(running, self.name)
        return {row: self.merge(trainer, pl_module, method, run)[0] for row, method in self.methods.items()}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the measured values, and count the validation."""
        super().on_validation_epoch_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validations += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validations so far, from which a resumed fit goes on counting."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of validations."""
        self._validations = state_dict["validations"]
