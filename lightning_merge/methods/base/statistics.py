"""The statistics of one parameter, stacked over the experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_merge.checkpoints import Weights
from lightning_merge.checkpoints.statistics_files import HOW_TO_MAKE


class ParameterStatistics(Mapping[str, Tensor]):
    """The statistics of one parameter, by kind, read when they are asked for: ``(T, …)``.

    Args:
        name: The name of the parameter.
        sources: The statistics of every expert; all have the same kinds.
        like: A tensor whose dtype and device the statistics get.
    """

    def __init__(self, name: str, sources: Sequence[Weights], like: Tensor) -> None:
        self._name = name
        self._sources = sources
        self._like = like

    def __getitem__(self, kind: str) -> Tensor:
        return torch.stack([source[f"{kind}.{self._name}"].to(self._like) for source in self._sources])

    def __contains__(self, kind: object) -> bool:
        return bool(self._sources) and f"{kind}.{self._name}" in self._sources[0]

    def __iter__(self) -> Iterator[str]:
        return (kind for kind in HOW_TO_MAKE if kind in self)

    def __len__(self) -> int:
        return len(list(iter(self)))
