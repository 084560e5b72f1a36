"""Jobs as tasks of a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_merge.evaluation.engines.dispatch import Workers
from lightning_merge.evaluation.engines.elsewhere import Elsewhere
from lightning_merge.evaluation.engines.parcels import Outcome, Parcel
from lightning_merge.utilities.errors import MergeError

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass(frozen=True, kw_only=True)
class Ray(Elsewhere):
    """Engine that does the jobs on a Ray cluster, as many at a time as there is room for.

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
    def workers(self, output: Path) -> Iterator[Workers[Any]]:
        """Connect to the cluster, and leave it as it was before."""
        import ray

        was_connected = ray.is_initialized()
        if not was_connected:
            try:
                ray.init(self.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, RuntimeError) as error:
                at = f"There is no Ray cluster at {self.address}" if self.address else "Ray could not be started"
                raise MergeError(f"{at}: {error}") from error
        try:
            self._check_room(ray.nodes())
            yield _RayWorkers(self)
        finally:
            if not was_connected:
                ray.shutdown()

    def _check_room(self, nodes: Sequence[dict[str, Any]]) -> None:
        """Raise a :class:`MergeError` if no machine has room for a job, for which Ray would wait without end."""
        rooms = [node["Resources"] for node in nodes if node["Alive"]]
        if not any(room.get("CPU", 0) >= self.cores and room.get("GPU", 0) >= self.gpus for room in rooms):
            have = "; ".join(f"{room.get('CPU', 0):g} and {room.get('GPU', 0):g}" for room in rooms)
            raise MergeError(
                f"A job wants {self.cores} CPU cores and {self.gpus} GPUs, and no machine of the Ray cluster has them "
                f"(CPU cores and GPUs: {have}); set cpus and gpus of the engine."
            )


class _RayWorkers(Workers["ObjectRef[Outcome]"]):
    """Tasks of the cluster that Ray is connected to."""

    def __init__(self, options: Ray) -> None:
        import ray

        self._do = ray.remote(num_cpus=options.cores, num_gpus=options.gpus, max_retries=0)(_do)

    def hand_out(self, parcels: Sequence[Parcel]) -> list[ObjectRef[Outcome]]:
        """Start a task for each job."""
        return [self._do.options(name=parcel.name).remote(parcel) for parcel in parcels]

    def wait(self, handles: Sequence[ObjectRef[Outcome]]) -> list[tuple[ObjectRef[Outcome], Outcome]]:
        """Wait for the next one to end."""
        import ray

        ended, _ = ray.wait(list(handles))
        return [(handle, self._outcome(handle)) for handle in ended]

    def _outcome(self, handle: ObjectRef[Outcome]) -> Outcome:
        import ray

        try:
            return ray.get(handle)
        except ray.exceptions.RayTaskError as error:  # the worker cannot even read the parcel
            return Outcome(error=str(error))
        except ray.exceptions.RayError as error:  # worker or machine has died, or has no memory left
            return Outcome(error=str(error).strip().split("\n")[0].rstrip("."), lost=True)

    def take_back(self, handles: Sequence[ObjectRef[Outcome]]) -> list[ObjectRef[Outcome]]:
        """Take back none: Ray does not say which have begun, and those that have not end as soon as they do."""
        return []

    def stop(self, handles: Sequence[ObjectRef[Outcome]]) -> None:
        """Kill the workers."""
        import ray

        for handle in handles:
            ray.cancel(handle, force=True)


def _do(parcel: Parcel) -> Outcome:
    return parcel()
