"""The accuracy of a model on several tasks, measured by that of each task's expert."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_merge.utilities.errors import raise_all


@dataclass(frozen=True)
class NormalizedAccuracy:
    """The accuracies of a model, divided by those of the experts.

    Args:
        by_task: The ratio for every task.
    """

    by_task: Mapping[str, float]

    @property
    def average(self) -> float:
        """The mean over the tasks."""
        return sum(self.by_task.values()) / len(self.by_task)

    @property
    def worst(self) -> float:
        """The value of the worst task; NaN if one is."""
        return max(self.by_task.values(), key=lambda value: (math.isnan(value), -value))


def normalized_accuracy(accuracies: Mapping[str, float], experts: Mapping[str, float]) -> NormalizedAccuracy:
    """Divide the accuracy on every task by that of the task's own expert.

    Args:
        accuracies: A model's accuracy on each task.
        experts: The accuracy of each task's expert on its own task.

    Raises:
        MergeError: If there is no task, or one whose expert is missing or never right.
    """
    raise_all([] if accuracies else ["There is no task to normalize the accuracy of."])
    raise_all(
        [
            f"The accuracy on {task!r} cannot be normalized: its expert has none."
            for task in accuracies
            if not experts.get(task) or math.isnan(experts[task])
        ]
    )
    return NormalizedAccuracy({task: value / experts[task] for task, value in accuracies.items()})
