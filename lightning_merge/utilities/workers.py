"""Run work for many names on several threads, each with one thread of arithmetic."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from threading import Lock

import torch

from lightning_merge.utilities.progress import counted

_MOST_WORKERS = 8
"""Each worker holds a parameter of every expert in memory."""


_FEW_ENTRIES = 2_000_000


def count_workers(workers: int | None, device: torch.device, entries: int) -> int:
    """Count the workers: as many as asked for, by default one for every core that this process may use.

    One is enough for a GPU, and for a model with few entries, which is merged before a second thread has started.
    """
    if workers is not None:
        return workers
    if device.type != "cpu" or entries < _FEW_ENTRIES:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


def run_each(
    work: Callable[[str], None],
    names: Sequence[str],
    workers: int,
    what: str = "computing",
    cost: Callable[[str], float] = lambda name: 1.0,
    unit: str = "parameters",
) -> None:
    """Do some work for every name, in several threads, each with one thread of its own for the arithmetic.

    Linear algebra on many threads costs more than it gives on matrices of a few thousand rows, and its last digits
    depend on their number: so it always has one, and the result is the same for any number of workers.

    Args:
        work: What is done for a name.
        names: The names.
        workers: How many of them at the same time.
        what: What is done, where progress is shown (:mod:`lightning_merge.utilities.progress`).
        cost: What it costs for a name, in relation to the others.
        unit: What the names are of.
    """
    costs = {name: cost(name) for name in names}
    with one_thread(), counted(what, unit, list(costs.values())) as count:

        def one(name: str) -> None:
            work(name)
            count.step(costs[name])

        if workers == 1:
            for name in names:
                one(name)
            return
        pool = ThreadPoolExecutor(workers)
        try:
            runs = [copy_context().run for _ in names]  # threads see what the caller has set
            for _ in pool.map(lambda run, name: run(one, name), runs, names):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
            _free_buffers_of_mkl()


def _free_buffers_of_mkl() -> None:
    """Give back what MKL keeps for threads that have ended.

    Forked after that (``ddp_fork``, the workers of a ``DataLoader``), a process now and then finds MKL's list of them
    broken and multiplies its first matrices for ever.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if torch.backends.mkl.is_available() and library.is_file():
        free = getattr(ctypes.CDLL(str(library)), "mkl_serv_free_buffers", None)  # MKL is built into PyPI's PyTorch
        if free is not None:
            free()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread of the processor within the block."""
    global _threads, _merging
    with _lock:
        if not _merging:
            _threads = torch.get_num_threads()
            torch.set_num_threads(1)
        _merging += 1
    try:
        yield
    finally:
        with _lock:
            _merging -= 1
            if not _merging:
                torch.set_num_threads(_threads)


_lock, _merging, _threads = Lock(), 0, 1  # merges may go on in several threads of one process at the same time
