"""The options of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_merge.merging.repairing import Repair


@dataclass(frozen=True)
class Pretrain:
    """How the common start of all experts is fitted, where there is no pretrained model.

    Args:
        domains: The domains to fit it on; they are not among those that are left out.
        max_epochs: Epochs, if not as many as for an expert.
        hparams: Hyper-parameters of the model that differ from an expert's, such as ``learning_rate``.
    """

    domains: Sequence[str]
    max_epochs: int | None = None
    hparams: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One way to go from experts of several foundations to a model.

    Args:
        align: What the foundations' channels are matched by; ``nothing``: they stay where they are.
        repair: What is corrected after the merge; null: nothing.
    """

    align: Literal["weights", "activations", "nothing"] = "weights"
    repair: Repair | None = None


@dataclass(frozen=True)
class Foundations:
    """How foundations are fitted, and what is done with their experts.

    Args:
        domains: The tasks that the foundations are fitted on; no expert is of them.
        arms: The ways to be compared, by the name of their rows.
        merged: How many experts are merged, the first ones of the domains: 2, 3, ….
        count: How many foundations; the experts are fitted from them in turn.
        seeds: The whole is done once for each; the numbers are means over them.
        max_epochs: Epochs of a foundation, if not as many as of an expert.
        hparams: Hyper-parameters of a foundation's model that differ from an expert's.
        private: Shell patterns of the parameters that every expert keeps to itself.
        batches: The most batches of each task's training images that are looked at to align and to repair.
        batch_size: Images of such a batch.
        restarts: Searches of weight matching, of which the best one counts.
    """

    domains: Sequence[str]
    arms: dict[str, Arm]
    merged: Sequence[int] = (2,)
    count: int = 2
    seeds: Sequence[int] = (0,)
    max_epochs: int | None = None
    hparams: dict[str, Any] = field(default_factory=dict)
    private: Sequence[str] = ("head.*",)
    batches: int = 8
    batch_size: int = 64
    restarts: int = 2
