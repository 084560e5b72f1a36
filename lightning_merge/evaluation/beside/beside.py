"""Evaluate other weights of a LightningModule as ``trainer.test`` would, within an evaluation of its own weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_merge.checkpoints.weights import plain_names
from lightning_merge.evaluation.beside.candidate_loop import CandidateLoop, CandidateNumbers
from lightning_merge.evaluation.beside.repeats import loaders_of
from lightning_merge.evaluation.beside.snapshot import Snapshot
from lightning_merge.utilities.processes import Processes


class Beside:
    """Evaluation of other weights in the module itself, once its own evaluation has gone through the data.

    For each candidate the module, its data and the random numbers are put back to where the evaluation began, the
    candidate's weights are written into the module's, and Lightning's own loop calls all of the module's hooks,
    ``setup`` first, while callbacks and loggers rest. Afterwards everything is as it was before the first candidate.
    A sample that Lightning's sampler repeats on several processes is counted once.

    It is made before the loop draws its first batch.

    Args:
        trainer: The trainer, within an evaluation.
        module: Its module.
        processes: The processes of the run.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, processes: Processes) -> None:
        self._trainer, self._module, self._processes = trainer, module, processes
        self._start = Snapshot(module, loaders_of(trainer), tensors_of(module).values())
        self._candidates: dict[str, dict[str, Tensor]] = {}

    @property
    def has_candidates(self) -> bool:
        """Whether the weights have been given."""
        return bool(self._candidates)

    def take(self, candidates: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take all of the module's weights, with its shapes ``(…)``, by the candidate's name.

        Names are without what ``torch.compile`` puts into them.
        """
        self._candidates = apart_from(self._module, candidates)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Evaluate the candidates; all processes must call it, after the loop's last batch.

        Returns:
            The numbers that the module logs by epoch, by candidate and name.
        """
        now = Snapshot(self._module, loaders_of(self._trainer))
        with ExitStack() as stack:
            for tensor in now.tensors:
                if not tensor.is_inference():  # the others have no versions
                    stack.enter_context(torch.autograd._unsafe_preserve_version_counter(tensor))
            stack.callback(now.restore)
            return {row: self._numbers(weights) for row, weights in self._candidates.items()}

    def _numbers(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Evaluate one candidate."""
        numbers = CandidateNumbers(self._trainer, self._processes)
        try:
            self._start.restore()
            with self._set_aside(numbers):
                self._set_up(weights)
                self._trainer._evaluation_loop.run()
            numbers.meet()
        except Exception as error:
            if not numbers.have_heard:
                with self._processes.together():  # stop the others
                    raise error
            raise
        every = self._processes.gather(list(numbers.values))
        return {name: numbers.values[name] for name in every[0]}

    @contextmanager
    def _set_aside(self, numbers: CandidateNumbers) -> Iterator[None]:
        """Give the trainer another loop and other numbers, and no callbacks; afterwards it is as it was."""
        trainer, loop = self._trainer, self._trainer._evaluation_loop
        attributes, wrapped = dict(vars(trainer)), trainer.strategy.model
        others = call._call_callback_hooks

        def hooks(caller: Trainer, *args: Any, **kwargs: Any) -> None:
            if caller is not trainer:
                others(caller, *args, **kwargs)

        try:
            trainer._logger_connector = numbers
            trainer.strategy.model = self._module  # DistributedDataParallel would wait for the others at every step
            _set_loop(trainer, CandidateLoop(loop, self._processes))
            with patch.object(call, "_call_callback_hooks", hooks):
                yield
        finally:
            vars(trainer).update(attributes)
            trainer.strategy.model = wrapped
            _set_loop(trainer, loop)

    def _set_up(self, weights: Mapping[str, Tensor]) -> None:
        """Write a candidate's weights ``(…)`` into the module and call its ``setup``, which may make layers anew."""
        module = self._module
        load(module, weights)
        if not is_overridden("setup", module):
            return
        before = {id(tensor) for tensor in tensors_of(module).values()}
        stage = TrainerFn.TESTING if self._trainer.testing else TrainerFn.VALIDATING
        with torch.inference_mode(False), torch.enable_grad():
            call._call_lightning_module_hook(self._trainer, "setup", stage=stage)
        tensors = tensors_of(module)
        if any(id(tensor) not in before for tensor in tensors.values()):
            module.to(self._trainer.strategy.root_device)
            kept = {name: tensor.clone() for name, tensor in tensors.items() if id(tensor) in before}
            load(module, {**weights, **kept})


def tensors_of(module: LightningModule) -> dict[str, Tensor]:
    """Return a module's parameters and buffers ``(…)`` themselves, by their plain names in its state dict."""
    state = module.state_dict(keep_vars=True)
    found = {plain: state[key] for plain, key in plain_names("the module", state).items()}
    return {plain: value for plain, value in found.items() if isinstance(value, Tensor)}


def apart_from(module: LightningModule, candidates: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Copy those of the candidates' weights ``(…)`` that are the module's own and would change with it."""
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(module).values()}
    return {
        row: {
            name: tensor.clone() if tensor.untyped_storage().data_ptr() in own else tensor
            for name, tensor in weights.items()
        }
        for row, weights in candidates.items()
    }


def load(module: LightningModule, weights: Mapping[str, Tensor]) -> None:
    """Write weights ``(…)``, by their plain names, into a module's own tensors, as a checkpoint is loaded."""
    state = module.state_dict()
    inference = any(isinstance(value, Tensor) and value.is_inference() for value in state.values())
    state |= {key: weights[plain] for plain, key in plain_names("the module", state).items() if plain in weights}
    with torch.inference_mode(inference):
        module.load_state_dict(state, strict=module.strict_loading)


def _set_loop(trainer: Trainer, loop: Any) -> None:
    """Let a trainer evaluate by this loop."""
    if trainer.state.fn == TrainerFn.FITTING:
        trainer.fit_loop.epoch_loop.val_loop = loop
    elif trainer.state.fn == TrainerFn.VALIDATING:
        trainer.validate_loop = loop
    else:
        trainer.test_loop = loop
