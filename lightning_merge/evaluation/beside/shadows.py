"""Other weights of a LightningModule, taken through the batches of its own evaluation."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric

from lightning_merge.evaluation.beside.copies import copy_with_weights
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.processes import Processes

_LOG = inspect.signature(LightningModule.log)
_REDUCTIONS: dict[str, Callable[[list[float]], float]] = {"sum": sum, "max": max, "min": min}


@dataclass
class _Numbers:
    """The numbers that were logged under one name, as pairs ``(value, weight)``, and how they become one."""

    reduction: str
    weighted: list[tuple[Any, float]] = field(default_factory=list)

    def reduced(self) -> tuple[str, float, float]:
        """Reduce the numbers of this process: return the reduction, its result, and the sum of the weights."""
        values = torch.stack([torch.as_tensor(value) for value, _ in self.weighted]).cpu().double()  # (logged,)
        weights = torch.tensor([weight for _, weight in self.weighted], dtype=torch.float64)  # (logged,)
        if self.reduction == "mean":
            return self.reduction, float(values @ weights), float(weights.sum())
        return self.reduction, float(getattr(values, self.reduction)()), 1.0


class Shadow:
    """A copy of a module, with other weights, that goes through the batches of the original's evaluation.

    What it logs is reduced over batches as Lightning does it, and over all processes, whether or not the module asks
    for it. Numbers that are logged for single steps only are left out.

    Args:
        trainer: The original's trainer, within an evaluation.
        module: The original.
        weights: All of its weights, with its shapes ``(…)``, by name, as :func:`copy_with_weights` takes them.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, weights: Mapping[str, Tensor]) -> None:
        self.module = copy_with_weights(module, weights)
        self.module.trainer = trainer
        self.module.__dict__["log"] = self._log
        self.trainer = trainer
        self.stage = "test" if trainer.testing else "validation"
        self._batch: Any = None
        self._loader: int | None = None
        self._logged: dict[str, _Numbers | Metric] = {}

    def run_batch(self, batch: Any, batch_idx: int, dataloader_idx: int | None) -> None:
        """Run the module's hooks and its step on a batch, of which it gets its own copy.

        Args:
            batch: The batch, on the module's device.
            batch_idx: Its index.
            dataloader_idx: The index of its loader, if there are several.
        """
        if dataloader_idx != self._loader:
            self._logged = copy.deepcopy(self._logged)  # the metrics as they are now
        self._loader = dataloader_idx
        self._batch = batch = apply_to_collection(batch, Tensor, torch.clone, allow_frozen=True)
        where = (batch, batch_idx) if dataloader_idx is None else (batch, batch_idx, dataloader_idx)
        self._call(f"on_{self.stage}_batch_start", *where)
        step = f"{self.stage}_step"
        takes_index = is_param_in_hook_signature(getattr(self.module, step), "batch_idx", min_args=2)
        plugin = self.trainer.precision_plugin
        with plugin.test_step_context() if self.stage == "test" else plugin.val_step_context():
            output = self._call(step, *(where if takes_index else (batch, *where[2:])))
        self._call(f"on_{self.stage}_batch_end", output, *where)
        self._batch = None

    def end(self) -> None:
        """Run the module's hook for the end of the evaluation, in which it may wait for the other processes."""
        self._loader = None
        self._call(f"on_{self.stage}_epoch_end")

    def logged(self, processes: Processes) -> dict[str, float]:
        """Reduce what was logged, over batches and processes; all processes must call it.

        Returns:
            Every number that was logged, by its name.

        Raises:
            MergeError: If the processes have not logged the same metrics.
        """
        reduced = {
            name: numbers.reduced() if isinstance(numbers, _Numbers) else None for name, numbers in self._logged.items()
        }
        everywhere = processes.gather(reduced)
        metrics = [sorted(name for name, part in logged.items() if part is None) for logged in everywhere]
        if any(names != metrics[0] for names in metrics):
            raise MergeError(
                f"{type(self.module).__name__} has not logged the same metrics in every process (they are "
                f"{', '.join(sorted(set().union(*metrics)))}); log all of them in each."
            )
        values = _over_processes(everywhere)
        values |= {name: float(cast(Metric, self._logged[name]).compute()) for name in metrics[0]}
        return {name: values[name] for name in dict.fromkeys(name for logged in everywhere for name in logged)}

    def _call(self, hook: str, *arguments: Any) -> Any:
        """Call a hook or the step of the module, under whose name Lightning would log."""
        self.module._current_fx_name = hook  # as Lightning does
        return getattr(self.module, hook)(*arguments)

    def _log(self, *args: Any, **kwargs: Any) -> None:
        """Stand in for ``LightningModule.log``, with its arguments."""
        bound = _LOG.bind(self.module, *args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        if arguments["on_epoch"] is False:  # where it is left to Lightning, an evaluation logs by epoch
            return
        name, value = arguments["name"], arguments["value"]
        if self._loader is not None and arguments["add_dataloader_idx"]:
            name += f"/dataloader_idx_{self._loader}"
        if isinstance(value, Metric):
            self._logged[name] = value
            return
        reduce_fx = arguments["reduce_fx"]
        reduction = getattr(reduce_fx, "__name__", reduce_fx).lower().replace("avg", "mean")
        weight = 1
        if reduction == "mean" and self._batch is not None:
            weight = arguments["batch_size"] or extract_batch_size(self._batch)
        value = value.detach().clone().squeeze() if isinstance(value, Tensor) else value
        numbers = cast(_Numbers, self._logged.setdefault(name, _Numbers(reduction)))
        numbers.weighted.append((value, weight))


def _over_processes(everywhere: list[dict[str, tuple[str, float, float] | None]]) -> dict[str, float]:
    """Reduce what every process has reduced, to numbers of the precision in which Lightning logs."""
    values = {}
    for name in {name for logged in everywhere for name, part in logged.items() if part is not None}:
        parts = [part for logged in everywhere if (part := logged.get(name)) is not None]
        reduction, totals = parts[0][0], [total for _, total, _ in parts]
        if reduction == "mean":
            value = sum(totals) / (sum(weight for _, _, weight in parts) or float("nan"))
        else:
            value = _REDUCTIONS[reduction](totals)
        values[name] = float(torch.tensor(value))
    return values
