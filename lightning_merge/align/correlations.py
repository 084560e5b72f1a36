"""Cross-moments of the activations of two models: running sums that can be merged."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

CHUNK = 2**22  # entries that are seen in float64 at once
DEAD = 1e-12  # a unit whose variance is below this share of its mean square is constant up to rounding


@dataclass
class CrossMoments:
    """Means, variances and covariances of the units of two models, in float64.

    They are the same, up to rounding, for any division of the samples into batches or processes (Chan, Golub, LeVeque:
    Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979).

    Args:
        count: The number of samples ``()``.
        mean_a: The means of the first model's units ``(n,)``.
        mean_b: Those of the second model's units ``(m,)``.
        squares_a: The sums of their squared deviations from the mean ``(n,)``.
        squares_b: Those of the second model ``(m,)``.
        products: The sums of the products of the deviations ``(n, m)``.
    """

    count: Tensor
    mean_a: Tensor
    mean_b: Tensor
    squares_a: Tensor
    squares_b: Tensor
    products: Tensor

    @classmethod
    def empty(cls, n: int, m: int | None = None, device: torch.device | str = "cpu") -> CrossMoments:
        """Make the moments of no samples, for n units of the first model and m (by default n) of the second."""
        m = n if m is None else m
        shapes = ((), (n,), (m,), (n,), (m,), (n, m))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def to(self, device: torch.device | str) -> CrossMoments:
        """Return these moments on a device."""
        return CrossMoments(*(getattr(self, field.name).to(device) for field in fields(self)))

    def update(self, a: Tensor, b: Tensor) -> None:
        """Add the activations ``(N, n)`` and ``(N, m)`` of the same samples."""
        rows = max(1, CHUNK // max(a.shape[1], b.shape[1], 1))
        for x, y in zip(a.split(rows), b.split(rows), strict=True):
            x, y = x.double(), y.double()
            mean_x, mean_y = x.mean(0), y.mean(0)
            x, y = x - mean_x, y - mean_y
            count = torch.tensor(len(x), dtype=torch.float64, device=x.device)
            self.merge(CrossMoments(count, mean_x, mean_y, x.square().sum(0), y.square().sum(0), x.T @ y))

    def merge(self, other: CrossMoments) -> None:
        """Add the samples of other moments of the same units."""
        if other.count == 0:
            return
        total = self.count + other.count
        weight = self.count * other.count / total
        delta_a, delta_b = other.mean_a - self.mean_a, other.mean_b - self.mean_b
        self.squares_a = self.squares_a + other.squares_a + weight * delta_a.square()
        self.squares_b = self.squares_b + other.squares_b + weight * delta_b.square()
        self.products = self.products + other.products + weight * torch.outer(delta_a, delta_b)
        self.mean_a = self.mean_a + delta_a * other.count / total
        self.mean_b = self.mean_b + delta_b * other.count / total
        self.count = total

    def correlation(self, epsilon: float = 0.0) -> Tensor:
        """Compute Pearson's correlations ``(n, m)`` of the units of both models; 0 for units that do not vary.

        Args:
            epsilon: Added to the product of the standard deviations (REPAIR's code has 1e-4), so that units that hardly
                vary count less.
        """
        count = self.count.clamp(min=1)
        std_a = self._deviation(self.squares_a / count, self.mean_a)
        std_b = self._deviation(self.squares_b / count, self.mean_b)
        scale = torch.outer(std_a, std_b)
        return torch.where(scale > 0, self.products / count / (scale + epsilon), 0.0)

    @staticmethod
    def _deviation(variance: Tensor, mean: Tensor) -> Tensor:
        return torch.where(variance > DEAD * (variance + mean.square()), variance, 0.0).sqrt()
