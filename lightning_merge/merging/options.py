"""The keyword arguments of a merge in one piece."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_merge.checkpoints import Source
from lightning_merge.checkpoints.streaming import SHARD_SIZE
from lightning_merge.methods import MergeMethod
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.utilities.batches import TaskBatches


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """The keyword arguments of :func:`lightning_merge.merge`, which says what each of them means."""

    statistics: Mapping[str, Source] | None = None
    module: nn.Module | None = None
    data: TaskBatches | None = None
    scale: float | None = None
    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    matrices: Matrices | None = None
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    seed: int = 0
    workers: int | None = None
    allow_non_finite: bool = False
    allow_strangers: bool = False
    keep_update: bool = False
    output: str | os.PathLike[str] | None = None
    resume: bool = False
    shard_size: int = SHARD_SIZE
    carry_code: bool = False
    distributed: bool = False

    @property
    def rule(self) -> Matrices:
        """The rule by which parameters count as matrices; by default ``lightning_merge.Matrices()``."""
        return self.matrices or Matrices()

    def scaled(self, method: MergeMethod) -> MergeMethod:
        """Return the method with the scaling coefficient that was asked for."""
        return method if self.scale is None else replace(method, scale=self.scale)

    def settings(self, device: torch.device) -> dict[str, Any]:
        """Collect the options that the merged weights depend on, as plain values for a manifest.

        Args:
            device: Where the merge is computed.
        """
        return {
            "matrices": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self.rule).items()},
            "include": None if self.include is None else list(self.include),
            "exclude": list(self.exclude),
            "dtype": None if self.dtype is None else str(self.dtype),
            "device": device.type,
            "seed": self.seed,
            "allow_non_finite": self.allow_non_finite,
        }
