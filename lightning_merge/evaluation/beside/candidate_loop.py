"""Lightning's own evaluation loop, once more, for other weights of the module."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from torch import Tensor

from lightning_merge.evaluation.beside.repeats import without_repeats
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.processes import Processes


class CandidateLoop(_EvaluationLoop):
    """Lightning's loop over the batches that another loop has gone through, on several processes without repeats.

    Args:
        other: The loop, whose loaders are used again.
        processes: The processes of the run.
    """

    def __init__(self, other: _EvaluationLoop, processes: Processes) -> None:
        super().__init__(other.trainer, other._trainer_fn, other._stage, False, other.inference_mode)
        self._combined_loader, self._max_batches = other._combined_loader, other._max_batches
        self._results = _Results(training=False) if processes.count > 1 else self._results
        self._left = other.batch_progress.current.ready

    def setup_data(self) -> None:
        """Do nothing: the loaders are there."""

    def _evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, dataloader_iter: Any) -> None:
        self._left -= 1
        assert self._combined_loader is not None
        if self._is_sequential or self.num_dataloaders == 1:
            batch, is_left = without_repeats(self._combined_loader.flattened[dataloader_idx], batch, batch_idx)
            if not is_left:
                return
        super()._evaluation_step(batch, batch_idx, dataloader_idx, dataloader_iter)

    def on_run_end(self) -> list[dict[str, Tensor]]:
        """End the evaluation.

        Raises:
            MergeError: If other batches have been read than at the first time.
        """
        if self._left:
            raise MergeError(
                "Every candidate reads the data from the start, and there were not as many batches as the first time; "
                "give loaders that can be gone through again, with the same samples."
            )
        return super().on_run_end()


class _Results(_ResultCollection):
    """What is logged on one of several processes, which does not wait for the others before the end of a loader."""

    @torch.compiler.disable
    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log a value, of this process alone."""
        alone = {"sync_dist": False, "sync_dist_fn": _Sync.no_op, "sync_dist_group": None, "rank_zero_only": False}
        super().log(*args, **kwargs | alone)


class CandidateNumbers(_LoggerConnector):
    """The numbers that a module logs by epoch with a candidate's weights, which go to no logger.

    On several processes they are reduced over all of them, whether or not the module asks for it. Before this, all
    processes must have come so far: an error in one is raised in the others.

    Args:
        trainer: The trainer.
        processes: The processes of the run.
    """

    def __init__(self, trainer: Trainer, processes: Processes) -> None:
        super().__init__(trainer)
        self.values: dict[str, float] = {}
        self.have_heard = False
        self._processes = processes
        self._reduced: set[str] = set()

    def log_metrics(self, metrics: dict[str, Tensor], step: int | None = None) -> None:
        """Write nothing."""

    def on_epoch_end(self) -> None:
        """Do nothing: :meth:`update_eval_epoch_metrics` follows."""

    def update_eval_epoch_metrics(self) -> dict[str, Tensor]:
        """Take what has been logged by epoch for one loader, or for all of them together."""
        results = self.trainer._results
        assert results is not None
        self.meet()
        if self._processes.count > 1:
            self._reduce(results)
        logged = super().update_eval_epoch_metrics()
        for _, item in results.valid_items():
            value = self._callback_metrics.get(name := results._forked_name(item, on_step=False)[0])
            if item.meta.on_epoch and value is not None and value.numel() == 1:
                self.values[name] = float(value)
        return logged

    def meet(self) -> None:
        """Wait until all processes have come so far; raise what has stopped one of them in all."""
        self.have_heard = True
        with self._processes.together():
            pass
        self.have_heard = False

    def _reduce(self, results: _ResultCollection) -> None:
        """Reduce the logged tensors ``()`` over all processes.

        Raises:
            MergeError: If the processes have not logged the same metrics.
        """
        new = {key: item for key, item in results.valid_items() if item.meta.on_epoch and key not in self._reduced}
        everywhere = self._processes.gather({key: _sent(item) for key, item in new.items()})
        metrics = [sorted(key for key, sent in logged.items() if sent is None) for logged in everywhere]
        if any(keys != metrics[0] for keys in metrics):
            names = ", ".join(sorted({key.partition(".")[2] for keys in metrics for key in keys}))
            raise MergeError(
                f"{type(self.trainer.lightning_module).__name__} has not logged the same metrics in every process "
                f"(they are {names}); log all of them in each."
            )
        for key in dict.fromkeys(key for logged in everywhere for key in logged):
            self._reduced.add(key)
            parts = [sent for logged in everywhere if (sent := logged.get(key)) is not None]
            if parts:
                item = results.setdefault(key, _ResultMetric(parts[0][0], is_tensor=True))
                if key not in new:
                    item.update(torch.zeros(()), 1)  # torchmetrics warns of what was never updated
                _set_total(item, [value for _, value, _ in parts], sum(weight for _, _, weight in parts))


def _sent(item: _ResultMetric) -> tuple[_Metadata, Tensor, int] | None:
    """Return what the other processes have to know of a logged tensor ``()``; None for a metric, which asks itself."""
    if not item.is_tensor:
        return None
    weight = int(item.cumulated_batch_size) if item.meta.is_mean_reduction else 0
    return item.meta, item.value.detach().cpu(), weight


def _set_total(item: _ResultMetric, values: list[Tensor], weight: int) -> None:
    """Put into a logged tensor ``()`` what all processes have logged, and the number of samples."""
    every = torch.stack(values).double()  # (processes,)
    reduction = "sum" if item.meta.is_mean_reduction else item.meta.reduce_fx.__name__
    device = item.value.device
    item.value = getattr(every, reduction)().to(device, values[0].dtype)
    if item.meta.is_mean_reduction:
        item.cumulated_batch_size = torch.tensor(weight, device=device)
