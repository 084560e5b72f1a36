"""Jobs as tasks of a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning_merge.evaluation.engines.dispatch import Workers
from lightning_merge.evaluation.engines.elsewhere import Elsewhere
from lightning_merge.evaluation.engines.parcels import Outcome, Parcel
from lightning_merge.utilities.errors import MergeError


@dataclass(frozen=True, kw_only=True)
class Ray(Elsewhere):
    """Does the jobs on a Ray cluster, as many at the same time as there is room for.

    Ray is an extra: ``pip install 'lightning_merge[ray]'``. All machines must see the current folder, the data and the
    output folder under the same names. A job whose worker has died is handed out again. A job that fails is not: what
    runs then is let finish, nothing else begins, and the benchmark ends with its error; what is finished stays, and
    the same command goes on from there. One launch hands each job out once, but two launches into one output folder at
    the same time know nothing of each other.

    Args:
        address: The cluster, such as ``auto``, ``HOST:PORT``; by default RAY_ADDRESS, or one that runs on this machine,
            or else this machine becomes one.
        cpus: CPU cores of a job, and threads of its arithmetic, on which last digits depend; by default as many as
            this process has threads (OMP_NUM_THREADS), so that the numbers are bit for bit those without an engine.
        gpus: GPUs of a job.
        retries: How often a job is handed out again when its worker was lost.
    """

    address: str | None = None
    package = "ray"

    @contextmanager
    def workers(self, output: Path) -> Iterator[Workers]:
        """The cluster, which is left as it was found."""
        import ray

        found = ray.is_initialized()
        if not found:
            try:
                ray.init(self.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, RuntimeError) as error:
                at = f"There is no Ray cluster at {self.address}" if self.address else "Ray could not be started"
                raise MergeError(f"{at}: {error}") from error
        try:
            self._check_room(ray.nodes())
            yield _RayWorkers(self)
        finally:
            if not found:
                ray.shutdown()

    def _check_room(self, nodes: Sequence[dict]) -> None:
        """Raise a :class:`MergeError` if no machine has room for a job, for which Ray would wait without end."""
        rooms = [node["Resources"] for node in nodes if node["Alive"]]
        if not any(room.get("CPU", 0) >= self.cores and room.get("GPU", 0) >= self.gpus for room in rooms):
            have = "; ".join(f"{room.get('CPU', 0):g} and {room.get('GPU', 0):g}" for room in rooms)
            raise MergeError(
                f"A job wants {self.cores} CPU cores and {self.gpus} GPUs, and no machine of the Ray cluster has them "
                f"(CPU cores and GPUs: {have}); set cpus and gpus of the engine."
            )


class _RayWorkers(Workers):
    """Tasks of the cluster that Ray is connected to."""

    def __init__(self, options: Ray) -> None:
        import ray

        self._do = ray.remote(num_cpus=options.cores, num_gpus=options.gpus, max_retries=0)(_do)

    def hand_out(self, parcels: Sequence[Parcel]) -> list[Hashable]:
        """Each is a task."""
        return [self._do.options(name=parcel.name).remote(parcel) for parcel in parcels]

    def wait(self, handles: Sequence[Hashable]) -> list[tuple[Hashable, Outcome]]:
        """Wait for the next one."""
        import ray

        ended, _ = ray.wait(list(handles))
        return [(handle, self._outcome(handle)) for handle in ended]

    def _outcome(self, handle: Hashable) -> Outcome:
        import ray

        try:
            return ray.get(handle)
        except ray.exceptions.RayTaskError as error:  # the worker cannot even read the parcel
            return Outcome(error=str(error))
        except ray.exceptions.RayError as error:  # worker or machine has died, or has no memory left
            return Outcome(error=str(error).strip().split("\n")[0].rstrip("."), lost=True)

    def take_back(self, handles: Sequence[Hashable]) -> list[Hashable]:
        """Ray does not say which have begun; those that have not will end as soon as they do."""
        return []

    def stop(self, handles: Sequence[Hashable]) -> None:
        """Kill the workers."""
        import ray

        for handle in handles:
            ray.cancel(handle, force=True)


def _do(parcel: Parcel) -> Outcome:
    return parcel()
