"""Jobs one after another, in this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info

from lightning_merge.evaluation.engines.engine import Engine
from lightning_merge.evaluation.jobs import JobList, do
from lightning_merge.progress import counted

if TYPE_CHECKING:
    from lightning_merge.trainer import MergeTrainer


@dataclass(frozen=True)
class Sequential(Engine):
    """Does one job after another in this process, or in the several processes of the trainer together."""

    def check(self, trainer: MergeTrainer) -> None:
        """Every trainer will do."""

    def run(self, benchmark: JobList, seed: int) -> None:
        """Do the jobs; an error in one of them is raised as it is."""
        jobs = benchmark.jobs()
        with counted("benchmark", "jobs", [1.0] * len(jobs), each_logged=True) as count:
            for job in jobs:
                count.note(job.name)
                try:
                    seconds = do(job, seed)
                except (KeyboardInterrupt, SystemExit):  # Lightning makes the second of the first within a fit
                    rank_zero_info(f"benchmark: interrupted in {job.name}; the same command goes on there")
                    raise
                count.step()
                rank_zero_info(f"benchmark: {job.name}, {seconds:.1f} s ({count})")
