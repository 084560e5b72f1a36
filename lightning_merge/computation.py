"""A merging method applied to models, parameter by parameter, by several workers at once."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from lightning_merge.checkpoints import Weights
from lightning_merge.inventory import Inventory
from lightning_merge.methods import MergeMethod
from lightning_merge.progress import counted
from lightning_merge.task_vectors import Scratch, TaskVectors, wide

_MOST_WORKERS = 8
"""Each worker holds a parameter of every expert in memory."""
_FEW_ENTRIES = 2_000_000


@dataclass(frozen=True)
class Computation:
    """A method applied to task vectors, parameter by parameter.

    Args:
        method: The method.
        base: The base.
        experts: The experts by name.
        task_vectors: The task vectors of every merged parameter.
        survey: What the method found in its look at the whole model.
        inventory: What happens to every parameter.
        workers: Parameters that are computed at the same time.
        updates: Where the updates are kept once they are computed; None to forget them.
        scratch: Where the task vectors of a parameter stand while it is merged.
    """

    method: MergeMethod
    base: Weights
    experts: Mapping[str, Weights]
    task_vectors: TaskVectors
    survey: Any
    inventory: Inventory
    workers: int = 1
    updates: dict[str, Tensor] | None = None
    scratch: Scratch = field(default_factory=Scratch, repr=False)

    def parameter(self, name: str) -> Tensor:
        """A parameter or buffer of the merged model: ``base + scale * update``, a mean, or the base's own."""
        if name in self.inventory.averaged:
            return mean_of(name, self.base, self.experts)
        if name in self.inventory.copied:
            return self.base[name].clone()
        return self._merged(name, self._update)

    def parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Several of them, held in memory."""
        found: dict[str, Tensor] = {}
        self.each(names, found.__setitem__)
        return {name: found[name] for name in names}

    def each(self, names: Sequence[str], use: Callable[[str, Tensor], None]) -> None:
        """Compute parameters and hand each to ``use(name, parameter)``, in no particular order; none is kept."""

        def one(name: str) -> None:
            use(name, self.parameter(name))

        run_each(one, names, self.workers, "merging", self.cost)
        self.scratch.forget()

    def all_merged(self) -> dict[str, Tensor]:
        """The parameters that the method merges."""
        return self._with_aliases(self.parameters(self.inventory.merged))

    def for_task(self, expert: int) -> dict[str, Tensor]:
        """The merged parameters as the method makes them for one expert's task; none if it makes no difference."""
        if not self.method.per_task:
            return {}
        found: dict[str, Tensor] = {}

        def one(name: str) -> None:
            found[name] = self._merged(name, lambda deltas, context: self.method.task_update(deltas(), expert, context))

        run_each(one, self.inventory.merged, self.workers, "merging", self.cost)
        self.scratch.forget()
        return self._with_aliases(found)

    def _with_aliases(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return found | {alias: found[owner] for alias, owner in self.inventory.tied.items() if owner in found}

    def rescaled(self, scale: float) -> Computation:
        """The same computation with another scaling coefficient."""
        return replace(self, method=replace(self.method, scale=scale))

    def cost(self, name: str) -> float:
        """What a parameter costs, in relation to the others: ``m n min(m, n)`` for a matrix that is factorized."""
        shape = self.base.meta[name].shape
        view = self.task_vectors.matrices.view(name, shape) if self.method.factorizes else None
        if view is None or name not in self.inventory.merged:
            return float(shape.numel())
        blocks, m, n = view
        return float(blocks * m * n * (min(m, n) + 1))

    def _update(self, deltas: Callable[[], Tensor], context: Any) -> Tensor:
        if self.updates is None:
            return self.method.update(deltas(), context)
        if context.name not in self.updates:
            self.updates[context.name] = self.method.update(deltas(), context)
        return self.updates[context.name]

    def _merged(self, name: str, update: Callable[[Callable[[], Tensor], Any], Tensor]) -> Tensor:
        own = self.base[name]
        context = self.task_vectors.context(name, self.survey, own)
        scratch = self.scratch if self.updates is None else None  # an update that is kept may be a part of them
        change = update(lambda: self.task_vectors.stack(name, own, scratch), context)
        return torch.add(context.base, change, alpha=self.method.scale).to(own)


def mean_of(name: str, base: Weights, experts: Mapping[str, Weights]) -> Tensor:
    """The mean of the experts' running statistics, in the dtype and on the device of the base."""
    own = base[name]
    copies = [wide(expert[name]).to(own.device) for expert in experts.values()]
    return torch.stack(copies).mean(dim=0).to(own)


def count_workers(workers: int | None, device: torch.device, entries: int) -> int:
    """As many workers as asked for; by default one for every core that this process may use.

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
        what: What is done, where progress is shown (:mod:`lightning_merge.progress`).
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
    """Have the arithmetic use one thread of the processor."""
    global _threads
    with _lock:
        if not _merging:
            _threads = torch.get_num_threads()
            torch.set_num_threads(1)
        _merging.append(None)
    try:
        yield
    finally:
        with _lock:
            _merging.pop()
            if not _merging:
                torch.set_num_threads(_threads)


_lock, _merging, _threads = Lock(), [], 1  # merges may go on in several threads of one process at the same time
