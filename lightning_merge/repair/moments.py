"""Mean and variance of every channel, added up batch by batch and process by process."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.processes import Processes
from lightning_merge.utilities.sites import Site, split_name

_Key = TypeVar("_Key", bound=Hashable)


class Moments:
    """The mean and the biased variance of every channel over all samples and places.

    Two of them are merged by the formula of Chan, Golub and LeVeque (1979), so that neither the order nor the size of
    the parts matters. They are kept in float64, on the CPU.

    Args:
        momentum: Keep moving averages instead, from mean 0 and variance 1: ``momentum`` of what is there and the rest
            of each batch, as BatchNorm of Flax does (0.99 in TACT's official code). What they start from stays in
            them: 0.99 to the power of the number of batches.

    Attributes:
        count: Values of a channel that were seen.
    """

    def __init__(self, momentum: float | None = None) -> None:
        if momentum is not None and not 0 <= momentum < 1:
            raise MergeError(f"Moments: momentum must be at least 0 and less than 1, got {momentum}.")
        self.momentum = momentum
        self.count = 0
        self._mean = torch.zeros((), dtype=torch.float64)
        self._variance = (
            torch.zeros((), dtype=torch.float64) if momentum is None else torch.ones((), dtype=torch.float64)
        )

    @classmethod
    def known(cls, count: int, mean: Tensor, variance: Tensor) -> Moments:
        """Build moments that were found before: of ``count`` values of each channel, ``(channels,)`` each."""
        moments = Moments()
        moments.count, moments._mean, moments._variance = count, _to_cpu(mean), _to_cpu(variance)
        return moments

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Compute the moments of one batch: ``(N, channels)``, of any type of numbers."""
        wide = x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64, copy=True)
        if not len(wide):
            return Moments()
        mean = wide.mean(dim=0)
        wide -= mean
        return cls.known(len(wide), mean, wide.square_().mean(dim=0))

    def update(self, x: Tensor) -> None:
        """Add one batch: ``(N, channels)``."""
        self.merge(self.of(x))

    def merge(self, other: Moments) -> None:
        """Add what another one has seen; to moving averages that is one batch."""
        self.count += other.count
        if not other.count:
            return
        between: Tensor | float = 0.0
        if self.momentum is not None:
            weight = 1 - self.momentum
        else:
            weight = other.count / self.count
            between = weight * (1 - weight) * (other._mean - self._mean).square()
        self._mean = (1 - weight) * self._mean + weight * other._mean
        self._variance = (1 - weight) * self._variance + weight * other._variance + between

    def gathered(self, processes: Processes) -> Moments:
        """Merge what all processes have seen, on each of them; every process must ask."""
        if processes.count == 1:
            return self
        return gather_moments({"": self}, processes).get("", self)

    @property
    def mean(self) -> Tensor:
        """The mean ``(channels,)``, in float64.

        Raises:
            MergeError: If nothing was seen.
        """
        if not self.count:
            raise MergeError("There is no mean of no values; give at least one batch.")
        return self._mean

    @property
    def variance(self) -> Tensor:
        """The variance ``(channels,)``, in float64, divided by the count.

        Raises:
            MergeError: If fewer than two values of each channel were seen.
        """
        if self.count < 2:
            raise MergeError(
                f"There is no variance of {self.count} value{'' if self.count == 1 else 's'} a channel (a linear layer "
                "that saw one image); give at least two images."
            )
        return self._variance

    @property
    def std(self) -> Tensor:
        """The standard deviation ``(channels,)``, in float64."""
        return self.variance.sqrt()

    @property
    def is_finite(self) -> bool:
        """Whether all values that were seen are finite numbers."""
        return bool(self._mean.isfinite().all() and self._variance.isfinite().all())


def gather_moments(own: Mapping[_Key, Moments], processes: Processes) -> dict[_Key, Moments]:
    """Merge, by name (or site), what all processes have seen, on each of them; every process must ask."""
    total: dict[_Key, Moments] = {}
    for part in processes.gather({name: (m.count, m._mean, m._variance) for name, m in own.items()}):
        for name, (count, mean, variance) in part.items():
            total.setdefault(name, Moments()).merge(Moments.known(count, mean, variance))
    return total


def to_tensors(moments: Mapping[Site, Moments]) -> dict[str, Tensor]:
    """Convert moments to tensors, for every site: ``mean`` and ``var`` ``(channels,)`` in float64, ``count``, ``axis``.

    Their names are ``mean.<site>``, ``var.<site>``, and so on.
    """
    tensors: dict[str, Tensor] = {}
    for site, of_site in moments.items():
        tensors |= {f"mean.{site.name}": of_site.mean, f"var.{site.name}": of_site.variance}
        tensors |= {f"count.{site.name}": torch.tensor(of_site.count), f"axis.{site.name}": torch.tensor(site.axis)}
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[Site, Moments]:
    """Rebuild the moments of every site from what :func:`to_tensors` returns; other tensors are left out.

    Raises:
        KeyError: If a site has a mean and lacks the rest.
        ValueError: If they are of other shapes.
    """
    moments = {}
    for name in [key.removeprefix("mean.") for key in tensors if key.startswith("mean.")]:
        path, is_input = split_name(name)
        mean, variance = tensors[f"mean.{name}"], tensors[f"var.{name}"]
        single = tensors[f"count.{name}"].numel() == tensors[f"axis.{name}"].numel() == 1
        if not single or mean.ndim != 1 or mean.shape != variance.shape:
            raise ValueError(f"mean and var of {name!r} are no vectors of one length, or count and axis no numbers")
        site = Site(path, int(tensors[f"axis.{name}"]), is_input)
        moments[site] = Moments.known(int(tensors[f"count.{name}"]), mean, variance)
    return moments


def _to_cpu(values: Tensor) -> Tensor:
    return values.cpu().double()
