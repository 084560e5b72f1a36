"""Hand jobs out to workers, each once all that it waits for is done."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from lightning_merge.evaluation.engines.parcels import Outcome, Parcel
from lightning_merge.evaluation.jobs import Job, tell
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.progress import Count, counted

Handle = TypeVar("Handle", bound=Hashable)
"""What a job is known by once it is handed out."""

_UNSEEN = (
    "it has ended well on {host}, and nothing of it is to be seen here, because the machines do not see the same "
    "output folder; choose one that all of them share under the same name."
)


class Workers(ABC, Generic[Handle]):
    """Processes that do jobs."""

    @abstractmethod
    def hand_out(self, parcels: Sequence[Parcel]) -> list[Handle]:
        """Give jobs to workers, which begin when there is room, and return a handle for each."""

    @abstractmethod
    def wait(self, handles: Sequence[Handle]) -> list[tuple[Handle, Outcome]]:
        """Wait until some of these jobs have ended, and return their outcomes."""

    @abstractmethod
    def take_back(self, handles: Sequence[Handle]) -> list[Handle]:
        """Take back those of these jobs that have not begun, as far as that can be known, and return them."""

    @abstractmethod
    def stop(self, handles: Sequence[Handle]) -> None:
        """End these jobs, wherever they are."""


class Dispatch(Generic[Handle]):
    """Dispatcher that hands out every job once those that it waits for are done.

    Args:
        jobs: All jobs, each after those that it waits for.
        workers: The workers that do them.
        parcel: A function that packs the job of a name.
        retries: How often a job is handed out again when its worker was lost.
        withdraw: Called when a job has failed, so that those that have not begun do not begin.
    """

    patience = 60.0  # s

    def __init__(
        self,
        jobs: Sequence[Job],
        workers: Workers[Handle],
        parcel: Callable[[str], Parcel],
        retries: int,
        withdraw: Callable[[], None],
    ) -> None:
        self._workers, self._parcel, self._retries, self._withdraw = workers, parcel, retries, withdraw
        self._waiting = list(jobs)
        self._running: dict[Handle, Job] = {}
        self._finished: set[str] = set()
        self._lost: Counter[str] = Counter()
        self._failure: Exception | None = None
        self._count = Count("benchmark", "jobs", [1.0] * len(jobs))

    def run(self) -> None:
        """Do all jobs.

        Raises:
            MergeError: If one of them has failed, or its worker was lost too often, once all that run have ended.
            RuntimeError: If one of them has failed with another error than a :class:`MergeError`.
        """
        with counted("benchmark", "jobs", [1.0] * len(self._waiting), each_logged=True) as self._count:
            try:
                self._hand_out(self._take())
                while self._running:
                    self._count.note(f"{len(self._running)} at work")
                    ended = self._workers.wait(list(self._running))
                    for job, outcome in [(self._running.pop(handle), outcome) for handle, outcome in ended]:
                        self._note(job, outcome)
                    if self._failure is None:
                        self._hand_out(self._take())
            except BaseException as error:
                self._workers.stop(list(self._running))
                if isinstance(error, KeyboardInterrupt):
                    tell("benchmark: interrupted; the same command goes on with the jobs that are not done")
                raise
        if self._failure is not None:
            raise self._failure

    def _take(self) -> list[Job]:
        """Take the jobs that wait for nothing any more; those that are done already are only counted."""
        ready, waiting = [], []
        for job in self._waiting:
            if not self._finished.issuperset(job.after):
                waiting.append(job)
            elif job.done():
                self._finish(job)
            else:
                ready.append(job)
        self._waiting = waiting
        return ready

    def _finish(self, job: Job) -> None:
        """Count a job as done."""
        self._finished.add(job.name)
        self._count.step()

    def _hand_out(self, jobs: Sequence[Job]) -> None:
        """Give jobs to the workers."""
        if jobs:
            handles = self._workers.hand_out([self._parcel(job.name) for job in jobs])
            self._running |= dict(zip(handles, jobs, strict=True))

    def _note(self, job: Job, outcome: Outcome) -> None:
        """Note the outcome of a job."""
        if outcome.error is None and not self._is_seen(job):
            outcome = replace(outcome, known=True, error=_UNSEEN.format(host=outcome.host or "its worker"))
        if outcome.error is None:
            self._finish(job)
            tell(f"benchmark: {job.name}, {outcome.seconds:.1f} s on {outcome.host} ({self._count})")
        elif outcome.lost and self._failure is None and self._lost[job.name] < self._retries:
            self._lost[job.name] += 1
            again = f"{self._lost[job.name]} of {self._retries}"
            tell(f"benchmark: {job.name} has lost its worker and is handed out again ({again})")
            self._hand_out([job])
        elif self._failure is None:
            self._failure = _error(job, outcome, self._lost[job.name] + 1)
            self._withdraw()
            for handle in self._workers.take_back(list(self._running)):
                del self._running[handle]
            running = ", ".join(other.name for other in self._running.values())
            tell(f"benchmark: {job.name} has failed" + (f"; waiting for {running}" if running else ""))

    def _is_seen(self, job: Job) -> bool:
        """Tell whether what a job has written is visible here; a network file system may take a while to show it."""
        latest = time.monotonic() + self.patience
        while not job.done():
            if time.monotonic() >= latest:
                return False
            time.sleep(1.0)
        return True


def _error(job: Job, outcome: Outcome, attempts: int) -> Exception:
    """Build the error to raise when a job has failed."""
    if outcome.lost:
        return MergeError(
            f"The job {job.name!r} has lost its worker {attempts} times, and is not handed out again: {outcome.error}; "
            "give it more memory or time, then the same command goes on with the jobs that are not done."
        )
    if outcome.known:
        text = f"The job {job.name!r} has failed: {outcome.error}"
        return MergeError(text, text.splitlines())
    return RuntimeError(f"The job {job.name!r} has failed on {outcome.host}:\n{outcome.error}")
