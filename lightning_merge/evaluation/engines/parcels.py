"""A job on its way to another process, and what comes back."""

from __future__ import annotations

import os
import platform
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lightning_merge.checkpoints import replacing, write_text
from lightning_merge.evaluation.jobs import Job, JobList, do_job
from lightning_merge.utilities.errors import MergeError


@dataclass(frozen=True)
class Outcome:
    """Outcome of a job.

    Args:
        seconds: The time that it took, in seconds.
        host: The machine that did it.
        error: The error that it failed with: the sentence of a :class:`MergeError`, or else a traceback.
        known: Whether that is a sentence.
        lost: Whether its worker has ended before it; the job itself did not fail, and ``error`` says what is known.
    """

    seconds: float = 0.0
    host: str = ""
    error: str | None = None
    known: bool = False
    lost: bool = False


@dataclass(frozen=True)
class Parcel:
    """A job on its way to another process, which does it by calling this.

    Args:
        name: The job's name.
        seed: The seed that it starts from.
        threads: Number of threads of its arithmetic, on which the last digits depend.
        folder: The folder of the benchmark, see :func:`send`; every machine can read it.
        withdrawals: Exceptions that say that the worker is taken away, and that nothing is wrong with the job.
        cwd: The current folder, which relative paths refer to.
        path: The folders that modules are imported from.
        precision: The precision of products of float32 matrices.
    """

    name: str
    seed: int
    threads: int
    folder: Path
    withdrawals: tuple[type[Exception], ...] = ()
    cwd: Path = field(default_factory=Path.cwd)
    path: Sequence[str] = field(default_factory=lambda: tuple(os.path.abspath(folder) for folder in sys.path))
    precision: str = field(default_factory=torch.get_float32_matmul_precision)

    def __call__(self) -> Outcome:
        """Do the job, unless another one has failed meanwhile."""
        try:
            if (self.folder / "stopped").exists():
                return Outcome(error="another job has failed before it began", known=True)
            seconds = do_job(self._job(), self.seed)
        except self.withdrawals:
            raise
        except MergeError as error:
            return Outcome(host=platform.node(), error=str(error), known=True)
        except Exception:  # the traceback goes to where it can be read
            return Outcome(host=platform.node(), error=traceback.format_exc())
        return Outcome(seconds, platform.node())

    def _job(self) -> Job:
        """Set up this process as the benchmark's own, and load the job."""
        import cloudpickle

        if not self.cwd.is_dir():
            raise MergeError(
                f"There is no folder {self.cwd} on {platform.node()}; workers must see the folders of the benchmark "
                "under the same names, so start it from a folder that all machines share."
            )
        os.chdir(self.cwd)
        sys.path[:] = [*self.path, *(folder for folder in sys.path if folder not in self.path)]
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.precision)
        benchmark: JobList = cloudpickle.loads((self.folder / "benchmark.pickle").read_bytes())
        return next(job for job in benchmark.jobs() if job.name == self.name)


def send(benchmark: JobList, folder: Path) -> None:
    """Write a benchmark to where the workers find it.

    Raises:
        MergeError: If something in it cannot be sent.
    """
    import cloudpickle

    try:
        content = cloudpickle.dumps(benchmark)
    except Exception as error:
        raise MergeError(
            f"The benchmark cannot be sent to another process: {error}; leave the part that cannot be pickled out of "
            "model, data, trainer or callbacks, or leave the engine out."
        ) from error
    with replacing(folder / "benchmark.pickle") as file:
        file.write_bytes(content)


def withdraw(folder: Path) -> None:
    """Tell jobs that have not begun not to begin."""
    write_text(folder / "stopped", "")


def clear(folder: Path) -> None:
    """Remove what was sent, and the folder if it is empty then."""
    for name in ("benchmark.pickle", "stopped"):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
