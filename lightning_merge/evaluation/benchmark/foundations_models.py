"""The models of a benchmark over several foundations: align the experts, merge, repair, and test on every task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_merge.align.foundations import Aligned
from lightning_merge.align.symmetries import Symmetries
from lightning_merge.checkpoints import Weights
from lightning_merge.data import DomainDataModule
from lightning_merge.evaluation.benchmark.options import Foundations
from lightning_merge.evaluation.candidates import Record, evaluate_candidates
from lightning_merge.evaluation.merge_data import calibration_images, on_device
from lightning_merge.evaluation.repeatable_trainer import RepeatableTrainer
from lightning_merge.evaluation.task_models import model_of_task, unfolded
from lightning_merge.merging import aligning
from lightning_merge.merging.merge import merge
from lightning_merge.merging.repairing import repair
from lightning_merge.methods import MergeMethod
from lightning_merge.repair import Correction, insert
from lightning_merge.repair.calibration import Known
from lightning_merge.repair.corrections import state_of

_OWN_EXPERT = "own expert"


class FittedFoundations(Protocol):
    """The part of a benchmark that its merged models are made from: its arguments, and what it has fitted."""

    trainer: RepeatableTrainer
    model: LightningModule
    datamodule: DomainDataModule
    methods: Mapping[str, MergeMethod]
    options: Foundations

    @property
    def names(self) -> list[str]:
        """The names of the foundations."""

    @property
    def symmetries(self) -> Symmetries:
        """The permutation groups of the model."""

    def foundation_of(self, tasks: Sequence[str]) -> dict[str, str]:
        """Return the foundation of every task's expert."""

    def foundation(self, study: int, name: str) -> Weights:
        """Open the weights of a foundation."""

    def expert(self, study: int, task: str) -> Weights:
        """Open the weights of a task's expert."""


@dataclass(frozen=True)
class TaskModel:
    """A merged model for one task.

    Args:
        arm: The name of the way in which it was made.
        method: The name of the merging method.
        task: The task.
        weights: All of its weights ``(…)``, by name.
        correction: The part of its repair that the weights cannot hold, to be inserted into the module.
    """

    arm: str
    method: str
    task: str
    weights: Mapping[str, Tensor]
    correction: Correction

    @property
    def row(self) -> str:
        """The name of its row in an evaluation."""
        return f"{self.arm}/{self.method}"


def measure(benchmark: FittedFoundations, study: int, tasks: Sequence[str]) -> list[Record]:
    """Merge the experts of some tasks in every way and test the models, and the experts, on every task.

    Args:
        benchmark: The benchmark.
        study: The seed of its foundations and experts.
        tasks: The tasks whose experts are merged.

    Returns:
        A record for every task, arm and method.
    """
    experts = {task: benchmark.expert(study, task) for task in tasks}
    candidates: dict[str, dict[str, Mapping[str, Tensor]]] = {task: {_OWN_EXPERT: experts[task]} for task in tasks}
    inserted = {task: Correction() for task in tasks}  # what the weights cannot hold, in any of the models
    for merged in models(benchmark, study, tasks, experts):
        candidates[merged.task][merged.row] = merged.weights
        inserted[merged.task] = inserted[merged.task].updated_by(merged.correction.identity())
    records = []
    for task in tasks:
        accuracies = _accuracies(benchmark, task, candidates[task], inserted[task])
        records += [
            {
                "seed": study,
                "merged": len(tasks),
                "arm": arm,
                "method": method,
                "task": task,
                "accuracy": accuracies[f"{arm}/{method}"],
                "expert": accuracies[_OWN_EXPERT],
            }
            for arm in benchmark.options.arms
            for method in benchmark.methods
        ]
    return records


def models(
    benchmark: FittedFoundations, study: int, tasks: Sequence[str], experts: Mapping[str, Weights]
) -> Iterator[TaskModel]:
    """Merge experts by every method and in every way, and yield the model of every task.

    Args:
        benchmark: The benchmark.
        study: The seed of its foundations and experts.
        tasks: The tasks whose experts are merged.
        experts: The experts by task.

    Yields:
        The models, those that share an alignment one after another.
    """
    options, module = benchmark.options, on_device(benchmark.trainer, benchmark.model)
    data = calibration_images("The benchmark", benchmark.datamodule, tasks, module, options.batches, options.batch_size)
    for by in dict.fromkeys(arm.align for arm in options.arms.values()):
        aligned = align(benchmark, by, study, experts, data)
        moments: dict[Any, Known] = {}  # observed once for all arms
        for name, method in benchmark.methods.items():
            merged = merge(aligned.base, aligned.experts, method, exclude=options.private, seed=study)
            for row, arm in options.arms.items():
                if arm.align != by:
                    continue
                repaired = merged
                if arm.repair is not None:
                    repaired = repair(arm.repair, merged, module, data, seed=study, known=moments)
                for task in tasks:
                    weights = repaired.for_task(task)
                    yield TaskModel(row, name, task, weights, unfolded(benchmark.model, repaired, task, weights))


def align(
    benchmark: FittedFoundations,
    by: Literal["weights", "activations", "nothing"],
    study: int,
    experts: Mapping[str, Weights],
    data: Mapping[str, Sequence[Any]],
) -> Aligned:
    """Permute the channels of experts so that those of all foundations match.

    Args:
        benchmark: The benchmark.
        by: The values that channels are matched by; ``nothing`` leaves them where they are.
        study: The seed of its foundations and experts.
        experts: The experts by task.
        data: For every task batches of images ``(N, …)``, to match activations by.

    Returns:
        The mean of the foundations and the experts, aligned.
    """
    paths = {name: str(benchmark.foundation(study, name).path) for name in benchmark.names}
    foundation_of = benchmark.foundation_of(list(experts))
    return aligning.align(
        aligning.Align(paths, foundation_of, by=by, restarts=benchmark.options.restarts),
        experts,
        benchmark.model,
        data,
        private=benchmark.options.private,
        symmetries=None if by == "nothing" else benchmark.symmetries,
        seed=study,
    )


def _accuracies(
    benchmark: FittedFoundations, task: str, rows: Mapping[str, Mapping[str, Tensor]], inserted: Correction
) -> dict[str, float]:
    """Test models on a task, in one pass over its data.

    Args:
        benchmark: The benchmark.
        task: The task.
        rows: The weights ``(…)`` of every model by name, by its row.
        inserted: The corrections that the module needs for any of them; for the others they change nothing.

    Returns:
        The accuracy of every row.
    """
    data = benchmark.datamodule.only(train=[], test=[task], test_on=benchmark.datamodule.test_on)
    model = model_of_task(benchmark.model, benchmark.datamodule, task)
    neutral = state_of(model, inserted)
    states = {row: {**neutral, **weights} for row, weights in rows.items()}
    corrected = cast(LightningModule, insert(model, inserted))
    measured = evaluate_candidates(benchmark.trainer.again(), corrected, data, states)
    return {record["row"]: record["accuracy"] for record in measured}
