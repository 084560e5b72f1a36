"""An engine whose jobs are done in other processes."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch

from lightning_merge.evaluation.engines.dispatch import Dispatch, Workers
from lightning_merge.evaluation.engines.engine import Engine
from lightning_merge.evaluation.engines.parcels import Parcel, clear, send, withdraw
from lightning_merge.evaluation.jobs import JobList
from lightning_merge.evaluation.repeatable_trainer import RepeatableTrainer
from lightning_merge.utilities.errors import MergeError


@dataclass(frozen=True, kw_only=True)
class Elsewhere(Engine):
    """Engine that hands every job to a worker process once all that it waits for is done.

    Args:
        cpus: CPU cores of a job, and threads of its arithmetic, on which last digits depend; by default as many as
            this process has threads (OMP_NUM_THREADS), so that the numbers are bit for bit those without an engine.
        gpus: GPUs of a job.
        retries: How often a job is handed out again when its worker was lost.
    """

    cpus: int | None = None
    gpus: int = 0
    retries: int = 3

    package: ClassVar[str]
    """The package that must be installed; the extra has the name of the class."""

    @property
    def cores(self) -> int:
        """CPU cores of a job."""
        return self.cpus or torch.get_num_threads()

    def check(self, trainer: RepeatableTrainer) -> None:
        """Check that the engine is installed, and that a job with this trainer is one process.

        Raises:
            MergeError: If one of these is not the case.
        """
        name = type(self).__name__
        try:
            import_module(self.package)
            import_module("cloudpickle")
        except ModuleNotFoundError as error:
            raise MergeError(
                f"The engine {name} needs {error.name}, which is not installed: "
                f"pip install 'lightning_merge[{name.lower()}]'."
            ) from error
        if trainer.world_size > 1:
            raise MergeError(
                f"{name} does jobs side by side, each in one process, and the trainer has {trainer.world_size}; set "
                "its devices and num_nodes to 1, or leave the engine out."
            )
        if trainer.strategy.root_device.type == "cuda" and not self.gpus:
            raise MergeError(f"The trainer runs on a GPU, and {name} gives its jobs none; set gpus of the engine to 1.")
        if self.gpus < 0 or self.retries < 0 or (self.cpus is not None and self.cpus < 1):
            raise MergeError(f"{name} takes at least 1 for cpus, and at least 0 for gpus and retries.")

    def run(self, benchmark: JobList, seed: int) -> None:
        """Do the jobs, as many at a time as there is room for."""
        folder = (benchmark.output / "engine").absolute()
        clear(folder)
        send(benchmark, folder)
        parcel = partial(Parcel, seed=seed, threads=self.cores, folder=folder)
        try:
            with self.workers(benchmark.output.absolute()) as workers:
                Dispatch(benchmark.jobs(), workers, parcel, self.retries, partial(withdraw, folder)).run()
        finally:
            clear(folder)

    @abstractmethod
    def workers(self, output: Path) -> AbstractContextManager[Workers[Any]]:
        """Provide the workers that do the jobs, for as long as they are needed."""
