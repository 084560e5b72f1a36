"""Engines run the jobs of a benchmark: in this process, on a Ray cluster, or as SLURM arrays."""

from __future__ import annotations

from typing import Literal

from lightning_merge.evaluation.engines.engine import Engine
from lightning_merge.evaluation.engines.ray_cluster import Ray
from lightning_merge.evaluation.engines.sequential import Sequential
from lightning_merge.evaluation.engines.slurm_arrays import Slurm

EngineName = Literal["ray", "slurm"]

__all__ = ["Engine", "EngineName", "Ray", "Sequential", "Slurm", "make_engine"]


def make_engine(engine: Engine | EngineName | None) -> Engine:
    """Build the engine of that name, with its defaults; without a name, the one that runs in this process."""
    if isinstance(engine, Engine):
        return engine
    return {None: Sequential, "ray": Ray, "slurm": Slurm}[engine]()
