"""A Trainer that can be built again with the same arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger

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


class RepeatableTrainer(_KnowsItsArguments, Trainer):
    """A ``Trainer`` that can be built again, for one job among many."""

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
