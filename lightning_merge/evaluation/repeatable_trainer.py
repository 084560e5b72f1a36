"""A Trainer that can be built again with the same arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn

from lightning_merge.utilities.processes import connected
from lightning_merge.utilities.signals import is_handled, terminate

if TYPE_CHECKING:
    from typing_extensions import Self


class _KnowsItsArguments:
    """A base that keeps all arguments it was called with, whatever constructors stand between it and ``Trainer``'s.

    It is a base class of its own because jsonargparse takes a class that defines ``__new__`` for one whose arguments
    are those of ``__new__``.
    """

    positional: tuple[Any, ...]
    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        self.positional, self.arguments = args, dict(kwargs)
        if isinstance(kwargs.get("callbacks"), list):
            self.arguments["callbacks"] = list(kwargs["callbacks"])  # Lightning adds its own to the list it is given
        return self


class _EndsAtOnce(_SignalConnector):
    """Connector that ends a run where SIGTERM arrives, as Ctrl-C does.

    Lightning's own goes on to the end of a batch, and past the last batch of an evaluation; and it broadcasts the
    signal, for which processes wait that got none. Where the program has a handler of its own, or SLURM is to begin a
    fit again, things stay as Lightning has them.
    """

    def _sigterm_notifier_fn(self, signum: Any, frame: Any) -> None:
        environment = self.trainer._accelerator_connector.cluster_environment
        begins_again = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        is_fit = self.trainer.state.fn == TrainerFn.FITTING
        if is_handled(self._original_handlers.get(signum)) or (begins_again and is_fit):
            super()._sigterm_notifier_fn(signum, frame)
            return
        if self.trainer.strategy.launcher is not None:
            self.trainer.strategy.launcher.kill(signum)
        terminate()


class RepeatableTrainer(_KnowsItsArguments, Trainer):
    """A ``Trainer`` that can be built again, for one job among many.

    Its runs end at once when they are asked to, and with a sentence when one of their processes was lost.
    """

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self._signal_connector = _EndsAtOnce(self)
        with connected():
            return super()._run(*args, **kwargs)

    def join_processes(self) -> bool:
        """Start the other processes of this run, or join them; tell whether there are any to share work with.

        Processes that are forked for one call and end with it (``ddp_spawn``, ``ddp_fork``) are not started for it.
        """
        launcher = self.strategy.launcher
        if self.world_size == 1 or not isinstance(launcher, _SubprocessScriptLauncher):
            return False
        if not (dist.is_available() and dist.is_initialized()):
            launcher.launch(self.strategy.setup_environment)
        return dist.is_initialized()

    @property
    def given_callbacks(self) -> list[Callback]:
        """The callbacks that were given, without those that Lightning or its command line added."""
        callbacks = self.arguments.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        return [callback for callback in callbacks if not isinstance(callback, SaveConfigCallback)]

    @property
    def given_loggers(self) -> list[Logger]:
        """The loggers that were given, without the one that Lightning makes where nothing is said."""
        loggers = self.arguments.get("logger")
        loggers = loggers if isinstance(loggers, (list, tuple)) else [loggers]
        return [logger for logger in loggers if isinstance(logger, Logger)]

    def again(self, callbacks: Sequence[Callback] = (), **changes: Any) -> Self:
        """Build a new trainer with the same arguments for one job among many.

        It has no progress bar, no logger and no checkpoints of its own.

        Args:
            callbacks: Its callbacks. Checkpoints are written only if a ``ModelCheckpoint`` is among them.
            changes: Arguments that differ.
        """
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
        quiet = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        }
        return type(self)(*self.positional, **{**self.arguments, **quiet, "callbacks": callbacks, **changes})
