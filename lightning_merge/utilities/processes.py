"""Share the work of one merge among the processes of a run, so that none waits for one that has failed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException

from lightning_merge.utilities.errors import MergeError

_LOST = re.compile(
    r"ProcessExitedException|Dist(Network|Store)Error|gloo/gloo/|remote process exited|NCCL communicator was aborted"
)
"""What errors are called, or say, where another process cannot be reached; most back ends have no class for it."""


class Processes:
    """The processes that compute a merge together: those of the default process group, or this one alone.

    Args:
        distributed: Whether to share; every process of the group must then make the same calls.

    Raises:
        MergeError: If there is no process group to share with.
    """

    def __init__(self, distributed: bool = False) -> None:
        if distributed and not (dist.is_available() and dist.is_initialized()):
            raise MergeError(
                "distributed=True shares the merge among the processes of a process group, and there is none; call "
                "torch.distributed.init_process_group first (torchrun, Lightning's ddp), or leave it out."
            )
        self.rank = dist.get_rank() if distributed else 0
        self.count = dist.get_world_size() if distributed else 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that does what only one may do."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Collect what every process has, in the order of their ranks; values must be picklable."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with connected():
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Have all processes finish a step, or all fail: an error in one of them stops the others, too.

        Raises:
            MergeError: If another process failed, with what it said.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        try:
            failures = self.gather(failure if failure is None or isinstance(failure, MergeError) else str(failure))
        finally:
            if failure is not None:
                raise failure
        for rank, other in enumerate(failures):
            if isinstance(other, MergeError):
                raise other
            if other is not None:
                raise MergeError(f"Process {rank} has failed, and the others stop: {other}")

    def in_step(self, items: Iterable[Any], what: str) -> Iterator[Any]:
        """Yield this process's items, one after another, while all processes have one.

        Args:
            items: The items, such as this process's part of every batch; None is none.
            what: What they are, for the message.

        Raises:
            MergeError: On every process, if one of them cannot read its next item, or has more of them than another.
        """
        remaining = iter(items)
        while True:
            with self.together():
                item = next(remaining, None)
            present = self.gather(item is not None)
            if not any(present):
                return
            if not all(present):
                raise MergeError(
                    f"The processes have different numbers of {what}; give each of them its part of every batch."
                )
            yield item

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor ``(…)`` over the processes, on all of them; the tensor itself is not changed."""
        if self.count == 1:
            return tensor
        total = tensor.detach().to(self._through or tensor.device, copy=True)
        with connected():
            dist.all_reduce(total)
        return total.to(tensor.device)

    @property
    def _through(self) -> torch.device | None:
        """The device that tensors must be on to be sent; None if any will do."""
        return torch.device("cuda") if dist.get_backend() == "nccl" else None

    def share(self, jobs: Sequence[str], cost: Callable[[str], float]) -> list[list[str]]:
        """Divide jobs among the processes so that all have about the same cost; the same on every process.

        Returns:
            The jobs of every process, the dearest first.
        """
        shares: list[list[str]] = [[] for _ in range(self.count)]
        load = [0.0] * self.count
        for job in sorted(jobs, key=lambda job: (-cost(job), job)):
            least = load.index(min(load))
            shares[least].append(job)
            load[least] += cost(job)
        return shares

    def exchange(
        self, tensors: dict[str, Tensor], owners: Sequence[Sequence[str]], like: Callable[[str], Tensor]
    ) -> None:
        """Add to ``tensors`` those that the other processes have computed.

        Args:
            tensors: What this process has computed, by name.
            owners: The names that every process has computed.
            like: An empty tensor for a name, on the device where it is wanted.
        """
        if self.count == 1:
            return
        through = self._through or torch.device("cpu")
        for rank, names in enumerate(owners):
            for name in names:
                computed = tensors.get(name)
                wanted = like(name) if computed is None else computed
                sent = wanted.detach().to(through).contiguous().reshape(-1)
                if sent.numel():
                    with connected():
                        dist.broadcast(sent.view(torch.uint8), src=rank)  # not every backend knows every dtype
                if computed is None:
                    tensors[name] = sent.reshape(wanted.shape).to(wanted.device)

    def from_first(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Send the tensors of the first process to every process; the others give None."""
        if self.count == 1:
            return dict(tensors or {})
        here = tensors or {}
        meta = self.gather({name: torch.empty_like(tensor, device="meta") for name, tensor in here.items()})[0]
        received = dict(here) if self.is_first else {}
        names = [list(meta), *([] for _ in range(self.count - 1))]
        self.exchange(received, names, like=lambda name: torch.empty_like(meta[name], device="cpu"))
        return received


@contextmanager
def connected() -> Iterator[None]:
    """Say it in a sentence if another process of the run was lost while this one exchanged something with it.

    Raises:
        MergeError: If a process was lost.
    """
    try:
        yield
    except (RuntimeError, ProcessException) as error:
        if not _LOST.search(f"{type(error).__name__}: {error}"):
            raise
        raise MergeError(
            "Another process of this run has ended or cannot be reached any more, and this one cannot go on without "
            "it; see what that one has said, and whether its machine had enough memory, then give the same command "
            "again."
        ) from error


def processes_of_run() -> Processes:
    """Find the processes of this run, if Lightning (or torchrun) has put them into one group; else this one alone."""
    return Processes(dist.is_available() and dist.is_initialized())
