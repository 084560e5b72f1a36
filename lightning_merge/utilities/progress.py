"""Say how far work has come: a bar on a terminal, now and then a plain line in a log, and nothing unless asked."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch.distributed as dist
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from lightning_merge.utilities.terminal import visible

_PATIENCE = 10.0  # s; work that is done by then leaves no line in a log
_DELAY = 1.0  # s; and by then no bar on a terminal
_WIDTH = 79  # of a bar where the terminal does not say how wide it is
_MOST_BARS = 2  # one over jobs and one over parameters
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
_logger = logging.getLogger("lightning_merge")
_asked: ContextVar[bool] = ContextVar("asked", default=False)
_open: ContextVar[int] = ContextVar("open", default=0)


@contextmanager
def show_progress(show: bool = True) -> Iterator[None]:
    """Show how far merging has come, within this block; nothing is shown without it.

    On a terminal that is a bar, with what is logged above it. Elsewhere (a pipe, a SLURM log), and where ``CI`` or
    ``TQDM_DISABLE`` are set or ``TERM`` is ``dumb``, it is a plain line at every quarter of work that takes longer than
    ten seconds, through the logger ``lightning_merge``. Of several processes only the first one shows anything.

    >>> with lm.show_progress():  # doctest: +SKIP
    ...     lm.merge("base.ckpt", ["photo.ckpt", "sketch.ckpt"], output="merged.ckpt")

    Args:
        show: False shows nothing, whatever the blocks around this one say.
    """
    token = _asked.set(show)
    try:
        yield
    finally:
        _asked.reset(token)


class Count:
    """A counter of work that is done; this one shows nothing.

    Args:
        what: What is done: ``merging``.
        unit: What its pieces are: ``parameters``.
        costs: What every piece costs, in relation to the others.
    """

    def __init__(self, what: str, unit: str, costs: Sequence[float]) -> None:
        self.what, self.unit, self.pieces, self.total = what, unit, len(costs), sum(costs)
        self.done, self._lock = 0, Lock()

    def __str__(self) -> str:
        return f"{self.done} of {self.pieces} {self.unit}"

    def step(self, cost: float = 1.0) -> None:
        """Note that one more piece is done, which cost so much; may be called from any thread."""
        with self._lock:
            self.done += 1
            self._show(cost)

    def note(self, now: str) -> None:
        """Say what is going on now."""

    def _show(self, cost: float) -> None:
        pass


class _Bar(Count):
    """A counter that shows a bar on a terminal, which is gone when the work is done."""

    def __init__(self, *args: Any, delay: float) -> None:
        super().__init__(*args)
        self._now = ""
        width = os.get_terminal_size(sys.stderr.fileno()).columns  # 0: the terminal does not say
        self.bar = _Tqdm(
            total=self.total,
            desc=self.what,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            file=sys.stderr,
            delay=delay,
            leave=False,
            ncols=None if width else _WIDTH,
            dynamic_ncols=bool(width),
            smoothing=0,
            miniters=0,
        )

    def note(self, now: str) -> None:
        with self._lock:
            self._now = f", {visible(now)}"
            self.bar.set_postfix_str(f"{self}{self._now}")

    def _show(self, cost: float) -> None:
        self.bar.set_postfix_str(f"{self}{self._now}", refresh=False)
        self.bar.update(cost)


class _Tqdm(tqdm):
    monitor_interval = 0  # no thread of its own, which a fork would copy in the middle of its work


class _Lines(Count):
    """A counter that logs a line at every quarter of work that takes long."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._started, self._spent, self._told = time.monotonic(), 0.0, 0

    def _show(self, cost: float) -> None:
        self._spent += cost
        quarter = 4 if self.done == self.pieces or not self.total else int(4 * self._spent / self.total)
        seconds = time.monotonic() - self._started
        if quarter > self._told and seconds >= _PATIENCE:
            _logger.info(f"{self.what}: {25 * quarter} %, {self} after {tqdm.format_interval(seconds)}")
        self._told = max(quarter, self._told)


@contextmanager
def counted(what: str, unit: str, costs: Sequence[float], *, each_logged: bool = False) -> Iterator[Count]:
    """Count pieces of work while they are done, and show that where it was asked for, see :func:`show_progress`.

    Args:
        what: What is done: ``merging``.
        unit: What its pieces are: ``parameters``.
        costs: What every piece costs, in relation to the others.
        each_logged: Whether there is a line in the log for each piece anyway; a bar is then shown at once.
    """
    depth = _open.get()
    with ExitStack() as stack:
        token = _open.set(depth + 1)
        stack.callback(_open.reset, token)
        if not _asked.get() or depth >= _MOST_BARS or not _is_first():
            yield Count(what, unit, costs)
        elif _has_terminal():
            stack.enter_context(_above_bars())
            count = _Bar(what, unit, costs, delay=0.0 if each_logged else _DELAY)
            stack.callback(count.bar.close)
            yield count
        else:
            stack.enter_context(_lines_shown())
            yield Count(what, unit, costs) if each_logged else _Lines(what, unit, costs)


def _is_first() -> bool:
    """Tell whether this process is the one of a run that speaks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0"


def _has_terminal() -> bool:
    """Tell whether bars can be seen, and nothing in the environment speaks against them."""
    unwanted = [name for name in ("CI", "TQDM_DISABLE") if os.environ.get(name, "").lower() not in ("", "0", "false")]
    return sys.stderr.isatty() and not unwanted and os.environ.get("TERM") != "dumb"


@contextmanager
def _above_bars() -> Iterator[None]:
    """Print what is logged to the terminal, and warnings, above the bars instead of within them.

    Handlers stay as they are but for their stream; tqdm's own ``logging_redirect_tqdm`` replaces them, and so loses
    their level.
    """
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", ())]
    console = [(handler, handler.stream) for handler in handlers if _writes_to_terminal(handler)]
    show = warnings.showwarning

    def show_above(*args: Any, **kwargs: Any) -> None:
        with tqdm.external_write_mode(sys.stderr):
            show(*args, **kwargs)

    try:
        for handler, stream in console:
            handler.setStream(DummyTqdmFile(stream))
        warnings.showwarning = show_above
        yield
    finally:
        warnings.showwarning = show
        for handler, stream in console:
            handler.setStream(stream)


def _writes_to_terminal(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None)
    if not isinstance(handler, logging.StreamHandler) or isinstance(stream, DummyTqdmFile):
        return False
    return stream is not None and hasattr(stream, "isatty") and stream.isatty()


@contextmanager
def _lines_shown() -> Iterator[None]:
    """Show the log lines of this package, unless somebody has configured logging."""
    level, handler = _logger.level, None
    if level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
    if not _logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        _logger.addHandler(handler)
    try:
        yield
    finally:
        _logger.setLevel(level)
        if handler is not None:
            _logger.removeHandler(handler)
