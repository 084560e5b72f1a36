"""The loss barrier: how much the loss rises on the straight line between two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_merge.analysis.losses import check_same
from lightning_merge.utilities.errors import MergeError

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Barrier:
    """Loss and accuracy on the line ``(1 - λ) a + λ b``.

    Args:
        lambdas: ``(points,)``, from 0 to 1.
        losses: ``(points,)``.
        accuracies: ``(points,)``.
    """

    lambdas: Tensor
    losses: Tensor
    accuracies: Tensor

    @property
    def barrier(self) -> float:
        """The largest rise of the loss above the line between the ends (Frankle et al., arXiv 1912.05671)."""
        return (self.losses - self._chord(self.losses)).max().item()

    @property
    def accuracy_barrier(self) -> float:
        """The largest fall of the accuracy below the line between the ends."""
        return (self._chord(self.accuracies) - self.accuracies).max().item()

    def _chord(self, values: Tensor) -> Tensor:
        return (1 - self.lambdas) * values[0] + self.lambdas * values[-1]


def loss_barrier(
    a: Weights, b: Weights, evaluate: Callable[[Weights], tuple[float, float]], points: int = 25
) -> Barrier:
    """Measure models on the straight line between two.

    Args:
        a: The model at λ = 0.
        b: The model at λ = 1, already permuted if it has to be.
        evaluate: The loss and the accuracy of a model, such as
            ``functools.partial(loss_and_accuracy, module, batches)``.
        points: The number of models to measure, both ends included.

    Raises:
        MergeError: If the models have other parameters or shapes, or if there are fewer than three points.
    """
    if points < 3:
        raise MergeError(f"A barrier lies between the ends of the line; points must be at least 3, got {points}.")
    check_same(a, b)
    lambdas = torch.linspace(0, 1, points, dtype=torch.float64)
    measured = torch.tensor([evaluate(interpolate(a, b, at)) for at in lambdas.tolist()], dtype=torch.float64)
    return Barrier(lambdas, measured[:, 0], measured[:, 1])


def interpolate(a: Weights, b: Weights, at: float) -> dict[str, Tensor]:
    """Compute the model ``(1 - at) a + at b``, with its running statistics; what is no float is that of ``a``."""
    return {
        name: ((1 - at) * tensor + at * b[name].to(tensor.device)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in a.items()
    }
