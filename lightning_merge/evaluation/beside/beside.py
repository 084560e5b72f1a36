"""Evaluate other weights of a LightningModule beside it, in one pass over the data, by its own steps and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_merge.evaluation.beside.repeats import loaders_of, without_repeats
from lightning_merge.evaluation.beside.shadows import Shadow
from lightning_merge.utilities.processes import Processes


class Beside:
    """Evaluation of other weights, batch by batch beside the module's own.

    Each of the weights gets a copy of the module, as it is after its hooks for the start of the evaluation. Every copy
    runs on its own copy of each batch, and leaves the random numbers of the run as they are. A sample that Lightning's
    sampler repeats on several processes is counted once. No process waits for another until the end, so that they may
    have different numbers of batches; an error is kept until then, and raised in all of them.

    Args:
        trainer: The trainer, within an evaluation.
        module: Its module, which is not changed.
        candidates: All of the module's weights, with its shapes ``(…)``, by the candidate's name, as
            :func:`lightning_merge.evaluation.beside.copies.copy_with_weights` takes them.
        processes: The processes of the run.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        candidates: Mapping[str, Mapping[str, Tensor]],
        processes: Processes,
    ) -> None:
        self._loaders = loaders_of(trainer)
        self._shadows = {name: Shadow(trainer, module, weights) for name, weights in candidates.items()}
        self._processes = processes
        self._failure: Exception | None = None

    def run_batch(self, batch: Any, batch_idx: int, dataloader_idx: int | None = None) -> None:
        """Run every candidate on a batch, which is not changed.

        Args:
            batch: The batch, on the module's device.
            batch_idx: Its index.
            dataloader_idx: The index of its loader; None where there is one, or where one batch is from all of them.
        """
        if self._failure is not None:
            return
        try:
            if dataloader_idx is not None or len(self._loaders) == 1:
                batch, is_left = without_repeats(self._loaders[dataloader_idx or 0], batch, batch_idx)
                if not is_left:
                    return
            for shadow in self._shadows.values():
                with isolate_rng():
                    shadow.run_batch(batch, batch_idx, dataloader_idx)
        except Exception as error:
            if self._processes.count == 1:
                raise
            self._failure = error

    def finish(self) -> dict[str, dict[str, float]]:
        """End the evaluation; all processes must call it.

        Returns:
            The numbers that every candidate logged, by their names.
        """
        with self._processes.together():
            if self._failure is not None:
                raise self._failure
        for shadow in self._shadows.values():
            with self._processes.together(), isolate_rng():
                shadow.end()
        return {name: shadow.logged(self._processes) for name, shadow in self._shadows.items()}
