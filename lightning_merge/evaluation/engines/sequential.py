"""Jobs one after another, in this process."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_merge.evaluation.engines.engine import Engine
from lightning_merge.evaluation.jobs import JobList, do_job, tell
from lightning_merge.evaluation.repeatable_trainer import RepeatableTrainer
from lightning_merge.utilities.progress import counted


@dataclass(frozen=True)
class Sequential(Engine):
    """Engine that does one job after another in this process, or in the several processes of the trainer together."""

    def check(self, trainer: RepeatableTrainer) -> None:
        """Accept every trainer."""

    def run(self, benchmark: JobList, seed: int) -> None:
        """Do the jobs; an error in one of them is raised as it is."""
        jobs = benchmark.jobs()
        with counted("benchmark", "jobs", [1.0] * len(jobs), each_logged=True) as count:
            for job in jobs:
                count.note(job.name)
                try:
                    seconds = do_job(job, seed)
                except (KeyboardInterrupt, SystemExit):  # Lightning makes the second of the first within a fit
                    tell(f"benchmark: interrupted in {job.name}; the same command goes on there")
                    raise
                count.step()
                tell(f"benchmark: {job.name}, {seconds:.1f} s ({count})")
