"""AdaMerging (ICLR 2024, arXiv 2310.02575).

Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_merge.methods import ties
from lightning_merge.methods.base import Context, MergeMethod, Paper, check_choice, check_range
from lightning_merge.methods.base.task_data import TaskData
from lightning_merge.methods.base.task_vectors import TaskVectors


class Survey(NamedTuple):
    """The coefficients that AdaMerging learns, and what TIES knows of the whole model."""

    coefficients: Mapping[str, Tensor]
    """``(T,)`` in [0, 1] for every parameter."""
    ties: ties.Survey | None = None
    """For AdaMerging++."""


def entropy(logits: Tensor) -> Tensor:
    """Compute the entropy of every prediction, in nats: ``(N, classes) -> (N,)``."""
    return -(logits.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)


def combine(deltas: Tensor, coefficients: Tensor) -> Tensor:
    """Sum the experts' task vectors, each with its coefficient: ``(T, …), (T,) -> (…)``."""
    return torch.tensordot(coefficients, deltas, dims=1)


def learn_coefficients(
    base: Mapping[str, Tensor],
    deltas: Mapping[str, Tensor],
    tasks: TaskData,
    coefficients: Tensor,
    lr: float,
    steps: int,
) -> Tensor:
    """Find the coefficients with which the merged model is most certain of its predictions.

    Each step of Adam lowers the sum over tasks of the mean entropy on one batch of the task.

    Args:
        base: L parameters ``(…)``.
        deltas: Their task vectors ``(T, …)``.
        tasks: The model and the unlabelled data, running.
        coefficients: ``(L, T)``, or ``(1, T)`` to share them, to start from.
        lr: Learning rate.
        steps: The number of steps of Adam.

    Returns:
        ``(L, T)`` in [0, 1].
    """
    coefficients = coefficients.clone().requires_grad_()
    optimizer = torch.optim.Adam([coefficients], lr=lr)
    batches = {expert: tasks.endless_batches(expert) for expert in tasks.experts}
    for _ in range(steps):
        rows = coefficients.clamp(0, 1).expand(len(base), -1)
        merged = {name: base[name] + combine(deltas[name], row) for name, row in zip(base, rows, strict=True)}
        losses = [entropy(tasks.logits(expert, merged, next(batches[expert]))).mean() for expert in tasks.experts]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    return coefficients.detach().clamp(0, 1).expand(len(base), -1)


@dataclass(frozen=True)
class AdaMerging(MergeMethod):
    """Task Arithmetic whose coefficients are learned, by minimising the entropy of the merged model's predictions.

    Needs the module and unlabelled batches of every expert's task: ``merge(…, module=…, data=…)``. The paper adapts on
    the test images of the merged tasks, 16 to a batch. The command line takes the training images of the experts'
    domains instead, and ``benchmark`` never those of the domain that is left out: adapting on these would measure
    something else than how the merged model does on a domain that nobody has seen.

    All task vectors are held in memory at once, on the module's device. Unlike the paper's text, the authors' code adds
    up two batches of every task in a step.

    Args:
        granularity: A coefficient for every expert and parameter tensor (``layer``), or for every expert (``task``).
        trimmed: AdaMerging++: leave only those entries of the task vectors that TIES' trimming and election of signs
            keep, as the authors' code does.
        density: Share of each task vector that TIES' trimming keeps; in (0, 1].
        init: The coefficients' first value, in [0, 1].
        lr: Learning rate of Adam; must be positive.
        steps: Steps of Adam, each on one batch of every task.
        scale: Scaling coefficient of the update; the coefficients are learned for 1.
    """

    paper: ClassVar[Paper] = Paper("Yang et al.", "ICLR", 2024, "2310.02575")
    formula: ClassVar[str] = "τ = Σ_t λ_t Δ_t; λ minimises the entropy of the merged model's predictions"
    needs_data: ClassVar[bool] = True
    reads_twice: ClassVar[bool] = True

    granularity: Literal["layer", "task"] = "layer"
    trimmed: bool = False
    density: float = 0.2
    init: float = 0.3
    lr: float = 1e-3
    steps: int = 500

    def __post_init__(self) -> None:
        check_choice(self, "granularity", ("layer", "task"))
        check_range(self, "density", 0, 1, open_low=True)
        check_range(self, "init", 0, 1)
        check_range(self, "lr", 0, float("inf"), open_low=True)
        check_range(self, "steps", 0, float("inf"), open_high=True)

    def survey(self, task_vectors: TaskVectors) -> Survey:
        """Learn the coefficients of every parameter."""
        tasks, names = task_vectors.tasks, list(task_vectors)
        kept = ties.TIES(density=self.density).survey(task_vectors) if self.trimmed else None
        base = {name: task_vectors.context(name).base.to(tasks.device) for name in names}
        deltas = {name: self._kept(task_vectors[name], kept).to(tasks.device) for name in names}
        rows = len(names) if self.granularity == "layer" else 1
        start = torch.full((rows, task_vectors.num_experts), self.init, dtype=base[names[0]].dtype, device=tasks.device)
        with tasks.running(), torch.enable_grad():
            coefficients = learn_coefficients(base, deltas, tasks, start, self.lr, self.steps)
        return Survey(dict(zip(names, coefficients, strict=True)), kept)

    def _kept(self, deltas: Tensor, survey: ties.Survey | None) -> Tensor:
        return deltas if survey is None else ties.TIES(density=self.density).kept(deltas, survey)

    def update(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter: ``(T, …) -> (…)``, see :func:`combine`; all parameters alike."""
        survey: Survey = context.survey
        return combine(self._kept(deltas, survey.ties), survey.coefficients[context.name].to(deltas))
