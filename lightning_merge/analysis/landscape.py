"""The accuracy in the plane of two task vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_merge.analysis.losses import check_same
from lightning_merge.analysis.normalized import normalized_accuracy
from lightning_merge.checkpoints.names import is_running_statistic
from lightning_merge.utilities.errors import MergeError

Weights = Mapping[str, Tensor]
Point = tuple[float, float]


@dataclass(frozen=True)
class Plane:
    """The plane of the models ``base + x u + y v`` (Figures 1 and 2 of arXiv 2410.12766).

    ``u = τ_2`` and ``v = τ_1 - proj_u(τ_1)``, so that the second expert lies at (1, 0) and the first one at (x, 1).

    Args:
        base: The model at (0, 0); running statistics and what is no float are its own everywhere.
        u: The first direction.
        v: The second one, orthogonal to it.
        expert_1: The point of the first expert.
    """

    base: Weights
    u: Weights
    v: Weights
    expert_1: Point

    @property
    def expert_2(self) -> Point:
        """The point of the second expert."""
        return (1.0, 0.0)

    def task_arithmetic(self, scale: float) -> Point:
        """Locate ``base + scale (τ_1 + τ_2)`` in the plane."""
        return (scale * (1 + self.expert_1[0]), scale)

    def at(self, x: float, y: float) -> dict[str, Tensor]:
        """Compute the model at a point."""
        return {
            name: (tensor + x * self.u[name] + y * self.v[name]).to(tensor.dtype) if name in self.u else tensor
            for name, tensor in self.base.items()
        }


def task_plane(base: Weights, expert_1: Weights, expert_2: Weights) -> Plane:
    """Lay the plane through a base and two experts.

    Args:
        base: The common initialisation: the pretrained model, or the average of aligned foundations.
        expert_1: The expert above, at (x, 1).
        expert_2: The expert on the right, at (1, 0).

    Raises:
        MergeError: If the models have other parameters or shapes, or if the task vectors span no plane.
    """
    check_same(base, expert_1, ("base", "first"))
    check_same(base, expert_2, ("base", "second"))
    names = [name for name, tensor in base.items() if tensor.is_floating_point() and not is_running_statistic(name)]
    first, second = (
        {name: expert[name].to(base[name]) - base[name] for name in names} for expert in (expert_1, expert_2)
    )

    def dot(a: Weights, b: Weights) -> float:
        return sum((a[name].double() * b[name].double()).sum().item() for name in names)

    square = dot(second, second)
    if square == 0:
        raise MergeError("The second expert is the base itself; it spans no plane.")
    x = dot(first, second) / square
    v = {name: first[name] - x * second[name] for name in names}
    if dot(v, v) <= 1e-12 * dot(first, first):
        raise MergeError("The task vectors of the two experts lie on one line; they span no plane.")
    return Plane(base, second, v, (x, 1.0))


@dataclass(frozen=True)
class Landscape:
    """Accuracies on a grid in a plane.

    Args:
        xs: The x of each column ``(n,)``.
        ys: The y of each row ``(n,)``.
        accuracies: The accuracy on each task ``(n, n)``, a row for each y.
        average: The mean over the tasks of the normalized accuracy ``(n, n)``.
        worst: The normalized accuracy on the worst task ``(n, n)``.
    """

    xs: Tensor
    ys: Tensor
    accuracies: Mapping[str, Tensor]
    average: Tensor
    worst: Tensor

    def best(self, values: Tensor) -> Point:
        """Find the point of the grid where ``average`` or ``worst`` ``(n, n)`` is highest."""
        row, column = divmod(int(values.argmax()), len(self.xs))
        return self.xs[column].item(), self.ys[row].item()


def landscape(
    plane: Plane,
    evaluate: Callable[[dict[str, Tensor], str], float],
    experts: Mapping[str, float],
    points: int = 13,
    span: Point = (-1.5, 2.5),
) -> Landscape:
    """Measure models on a grid in a plane.

    Args:
        plane: The plane.
        evaluate: The accuracy of a model on a task. It is called anew for every point and task, and may recalibrate the
            model on the task's data first, as TACT does.
        experts: For every task the accuracy of its expert, which the models' are divided by.
        points: The number of models along a side.
        span: The least and the greatest coordinate of the grid, on both axes.
    """
    if points < 2:
        raise MergeError(f"A grid needs at least two points a side, got points={points}.")
    axis = torch.linspace(*span, points, dtype=torch.float64)
    accuracies = {task: torch.empty(points, points, dtype=torch.float64) for task in experts}
    average, worst = (torch.empty(points, points, dtype=torch.float64) for _ in range(2))
    for row, y in enumerate(axis.tolist()):
        for column, x in enumerate(axis.tolist()):
            weights = plane.at(x, y)
            measured = {task: evaluate(weights, task) for task in experts}
            normalized = normalized_accuracy(measured, experts)
            average[row, column], worst[row, column] = normalized.average, normalized.worst
            for task, value in measured.items():
                accuracies[task][row, column] = value
    return Landscape(axis, axis.clone(), accuracies, average, worst)
