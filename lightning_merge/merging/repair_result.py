"""The result of a repair: what it does to the models of the tasks, and what their weights cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_merge.repair.corrections import Correction

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Takes the complete weights of a model and returns others."""


@dataclass(frozen=True)
class RepairResult:
    """Result of a repair of a merged model.

    Args:
        changes: By expert, what is done to the complete weights of the model of its task.
        unrepaired: The merged parameters as they were, where the repair serves all tasks and is in
            :attr:`lightning_merge.merging.merged.Merged.weights`, too.
        corrections: The corrections of activations that the weights do not hold, by task.
        heads: The heads that were trained anew, by task and the parameter's name.
    """

    changes: Mapping[str, Change]
    unrepaired: Mapping[str, Tensor] | None = None
    corrections: Mapping[str, Correction] = field(default_factory=dict)
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
