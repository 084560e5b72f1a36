"""An end that somebody asks for: SIGTERM ends work as Ctrl-C does, at once, and through every ``finally``."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class Terminated(SystemExit):
    """The end of a process that was sent SIGTERM; its exit status says so."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


def terminate(*_: Any) -> NoReturn:
    """End this process, as a handler of SIGTERM.

    Raises:
        Terminated: In any case.
    """
    raise Terminated


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Raise :class:`Terminated` where SIGTERM arrives within the block, unless the program has a handler of its own."""
    if threading.current_thread() is not threading.main_thread() or is_handled(signal.getsignal(signal.SIGTERM)):
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_handled(handler: Any) -> bool:
    """Tell whether a handler of SIGTERM is the program's own."""
    return handler not in (None, signal.SIG_DFL, terminate)


def asked_end(error: BaseException | None) -> tuple[int, str] | None:
    """Find the exit status, and what to say, if an error is the end that somebody asked for.

    Args:
        error: What was raised, perhaps while the first error was handled: Lightning exits with status 1 after Ctrl-C.
    """
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return 128 + signal.SIGINT, "interrupted"
        if isinstance(error, Terminated) or type(error).__name__ == "SIGTERMException":  # Lightning's, at a batch's end
            return 128 + signal.SIGTERM, "ended by SIGTERM"
        error = error.__context__
    return None


def end_children() -> None:
    """Send SIGTERM to the processes that this one has forked, for which it would wait at its end."""
    for child in multiprocessing.active_children():
        child.terminate()
