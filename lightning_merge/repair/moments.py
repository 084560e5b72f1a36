"""Mean and variance of every channel, added up batch by batch and process by process."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_merge.errors import MergeError
from lightning_merge.sharing import Processes


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
    def of(cls, x: Tensor) -> Moments:
        """The moments of one batch: ``(N, channels)``, of any type of numbers."""
        found = Moments()
        wide = x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64, copy=True)
        found.count = len(wide)
        if found.count:
            mean = wide.mean(dim=0)
            wide -= mean
            found._mean, found._variance = _to_cpu(mean), _to_cpu(wide.square_().mean(dim=0))
        return found

    def update(self, x: Tensor) -> None:
        """Add one batch: ``(N, channels)``."""
        self.merge(self.of(x))

    def merge(self, other: Moments) -> None:
        """Add what another one has seen; to moving averages that is one batch."""
        self.count += other.count
        if not other.count:
            return
        if self.momentum is not None:
            weight, between = 1 - self.momentum, 0.0
        else:
            weight = other.count / self.count
            between = weight * (1 - weight) * (other._mean - self._mean).square()
        self._mean = (1 - weight) * self._mean + weight * other._mean
        self._variance = (1 - weight) * self._variance + weight * other._variance + between

    def gathered(self, processes: Processes) -> Moments:
        """The moments of what all processes have seen, on each of them; every process must ask."""
        if processes.count == 1:
            return self
        states = processes.gather((self.count, self._mean, self._variance))
        total = Moments()
        for count, mean, variance in states:
            part = Moments()
            part.count, part._mean, part._variance = count, mean, variance
            total.merge(part)
        return total

    @property
    def mean(self) -> Tensor:
        """``(channels,)``, float64.

        Raises:
            MergeError: If nothing was seen.
        """
        if not self.count:
            raise MergeError("There is no mean of no values; give at least one batch.")
        return self._mean

    @property
    def variance(self) -> Tensor:
        """``(channels,)``, float64, divided by the count.

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
        """``(channels,)``, float64: the square root of the variance."""
        return self.variance.sqrt()

    @property
    def is_finite(self) -> bool:
        """Whether all values that were seen are finite numbers."""
        return bool(self._mean.isfinite().all() and self._variance.isfinite().all())


def _to_cpu(values: Tensor) -> Tensor:
    return values.cpu().double()
