"""DARE.

Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", ICML 2024,
arXiv 2311.03099.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_choice, check_range
from lightning_merge.methods.base.wrapper import Wrapper
from lightning_merge.methods.magnitude import largest
from lightning_merge.methods.task_arithmetic import TaskArithmetic


def dare(deltas: Tensor, keep: Tensor, drop: float, rescale: bool = True) -> Tensor:
    """Drop what is not kept and rescale the rest.

    Args:
        deltas: ``(T, …)``.
        keep: ``(T, …)``, 1 for the entries that stay and 0 for the others.
        drop: The share that is dropped.
        rescale: Divide by ``1 - drop``, so that the expectation stays.

    Returns:
        ``(T, …)``.
    """
    return deltas * keep / (1 - drop if rescale else 1)


def keep_at_random(deltas: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """Mark by 1 the entries that stay, each with probability ``1 - drop``: ``(T, …) -> (T, …)``."""
    draws = torch.rand(deltas.shape, generator=generator)
    return draws.ge_(drop).to(deltas)


def keep_largest(deltas: Tensor, drop: float) -> Tensor:
    """Mark all but the ``int(drop * numel)`` smallest entries of each task tensor: ``(T, …) -> (T, …)``."""
    rows = deltas.reshape(len(deltas), -1)
    return largest(rows, rows.shape[1] - int(rows.shape[1] * drop)).reshape(deltas.shape)


@dataclass(frozen=True)
class DARE(Wrapper):
    """Drop and rescale: a random sparsification of every task vector, merged by another method.

    Args:
        method: The method that merges what is left.
        drop: Share of the entries that is dropped (p), in [0, 1); the paper drops 0.9 and more.
        rescale: Divide what is left by ``1 - drop``.
        strategy: Drop at ``random``, or, the paper's ablation, the smallest of every tensor (``magnitude``).
        scale: Scaling coefficient of the update; by default that of the method inside.
    """

    paper: ClassVar[Paper] = Paper("Yu et al.", "ICML", 2024, "2311.03099")
    formula: ClassVar[str] = "Δ_t becomes m_t ∘ Δ_t / (1 - p); m_t ~ Bernoulli(1 - p)"
    draws: ClassVar[bool] = True
    order_matters: ClassVar[bool] = True  # draws go by position
    default_method: ClassVar[MergeMethod] = TaskArithmetic()

    drop: float = 0.9
    rescale: bool = True
    strategy: Literal["random", "magnitude"] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "drop", 0, 1, open_high=True)
        check_choice(self, "strategy", ("random", "magnitude"))

    def transform(self, deltas: Tensor, context: Context) -> Tensor:
        """Change the task tensors: ``(T, …) -> (T, …)``, see :func:`dare`."""
        if self.strategy == "random":
            keep = keep_at_random(deltas, self.drop, context.generator("DARE"))
        else:
            keep = keep_largest(deltas, self.drop)
        return dare(deltas, keep, self.drop, self.rescale)
