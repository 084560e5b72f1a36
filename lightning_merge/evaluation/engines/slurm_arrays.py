"""Jobs as SLURM arrays, through submitit."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_merge.evaluation.engines.dispatch import Workers
from lightning_merge.evaluation.engines.elsewhere import Elsewhere
from lightning_merge.evaluation.engines.parcels import Outcome, Parcel
from lightning_merge.evaluation.repeatable_trainer import RepeatableTrainer
from lightning_merge.utilities.errors import MergeError

if TYPE_CHECKING:
    from submitit import AutoExecutor, Job


@dataclass(frozen=True, kw_only=True)
class Slurm(Elsewhere):
    """Engine that does the jobs as SLURM arrays, through submitit.

    submitit is an extra: ``pip install 'lightning_merge[slurm]'``. Start the benchmark where ``sbatch`` works and let
    it wait; jobs that become possible at the same time are one array. All machines must see the current folder, the
    data and the output folder under the same names. A job that SLURM ended without a result (a machine that failed, a
    time limit, preemption) is submitted again. A job that fails is not: what runs then is let finish, nothing else
    begins, and the benchmark ends with its error; what is finished stays, and the same command goes on from there. One
    launch submits each job once, but two launches into one output folder at the same time know nothing of each other.

    Args:
        folder: The folder of submitit's scripts and the jobs' logs; by default ``slurm`` in the output folder.
        partition: The partition, if not SLURM's default.
        account: The account to charge.
        time: The time limit of a job in minutes.
        memory: Memory of a job in GB.
        more: Other options of ``sbatch``, such as ``{qos: high}``.
        cluster: ``local`` runs the jobs on this machine without SLURM, all at the same time.
        cpus: CPU cores of a job, and threads of its arithmetic, on which last digits depend; by default as many as
            this process has threads (OMP_NUM_THREADS), so that the numbers are bit for bit those without an engine.
        gpus: GPUs of a job.
        retries: How often a job is submitted again when SLURM has ended it.
    """

    folder: str | None = None
    partition: str | None = None
    account: str | None = None
    time: int = 60
    memory: float | None = None
    more: dict[str, Any] = field(default_factory=dict)
    cluster: Literal["slurm", "local"] = "slurm"
    package = "submitit"

    def check(self, trainer: RepeatableTrainer) -> None:
        """Check that SLURM is there, too."""
        super().check(trainer)
        missing = [command for command in ("sbatch", "srun", "sacct", "scancel") if shutil.which(command) is None]
        if self.cluster == "slurm" and missing:
            raise MergeError(
                f"There is no SLURM here (no command {missing[0]}); start the benchmark on a machine from which jobs "
                "are submitted."
            )

    @contextmanager
    def workers(self, output: Path) -> Iterator[Workers[Any]]:
        """Set up the executor that submits the jobs."""
        import submitit

        executor = submitit.AutoExecutor(Path(self.folder or output / "slurm").absolute(), cluster=self.cluster)
        executor.update_parameters(
            name="benchmark",
            timeout_min=self.time,
            cpus_per_task=self.cores,
            slurm_srun_args=[f"--cpus-per-task={self.cores}"],  # srun has not taken it from sbatch since 22.05
            **({"gpus_per_node": self.gpus} if self.gpus else {}),
            **({"mem_gb": self.memory} if self.memory else {}),
            **({"slurm_partition": self.partition} if self.partition else {}),
            **({"slurm_account": self.account} if self.account else {}),
            **({"slurm_additional_parameters": self.more} if self.more else {}),
        )
        yield _SlurmWorkers(executor)


class _SlurmWorkers(Workers["Job[Outcome]"]):
    """Jobs of an executor."""

    poll = 1.0  # s

    def __init__(self, executor: AutoExecutor) -> None:
        self._executor = executor

    def hand_out(self, parcels: Sequence[Parcel]) -> list[Job[Outcome]]:
        """Submit the jobs as an array."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

        withdrawals = (UncompletedJobError,)  # submitit raises it within the job when its time is up
        try:
            return self._executor.submit_array([replace(parcel, withdrawals=withdrawals) for parcel in parcels])
        except (FailedJobError, FailedSubmissionError) as error:
            raise MergeError(f"SLURM does not take the jobs: {error}") from error

    def wait(self, handles: Sequence[Job[Outcome]]) -> list[tuple[Job[Outcome], Outcome]]:
        """Look for results every second, and ask SLURM about jobs without one less often."""
        while not (ended := [handle for handle in handles if handle.done()]):
            time.sleep(self.poll)
        return [(handle, self._outcome(handle)) for handle in ended]

    @staticmethod
    def _outcome(job: Job[Outcome]) -> Outcome:
        if job.exception() is None:
            return job.result()
        return Outcome(
            error=f"SLURM's job {job.job_id} has ended without a result ({job.state}), see {job.paths.stderr}",
            lost=True,
        )

    def take_back(self, handles: Sequence[Job[Outcome]]) -> list[Job[Outcome]]:
        """Cancel the jobs that are pending."""
        pending = [handle for handle in handles if handle.get_info().get("State") == "PENDING"]
        self.stop(pending)
        return pending

    def stop(self, handles: Sequence[Job[Outcome]]) -> None:
        """Cancel the jobs."""
        for handle in handles:
            handle.cancel(check=False)
