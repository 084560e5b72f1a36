"""The interface of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning_merge.evaluation.jobs import JobList
from lightning_merge.evaluation.repeatable_trainer import RepeatableTrainer


class Engine(ABC):
    """Engine that does the jobs of a benchmark; the numbers do not depend on which one it is."""

    @abstractmethod
    def check(self, trainer: RepeatableTrainer) -> None:
        """Raise a :class:`lightning_merge.MergeError` before any work if jobs with this trainer cannot be done here."""

    @abstractmethod
    def run(self, benchmark: JobList, seed: int) -> None:
        """Do every job that is not done, each from the same seed and after those that it waits for.

        Raises:
            MergeError: If a job fails; what is finished stays, and the same benchmark goes on from there.
        """
