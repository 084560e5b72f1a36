"""Merge experts of several foundations: fit foundations and experts, align, merge, repair, and measure on every task.

Every job leaves a ``done`` marker in its folder, so that a benchmark that was interrupted goes on where it stopped::

    output/settings.json
    output/seed 0/foundations/a/expert.ckpt      the foundations a, b, …, from different seeds
    output/seed 0/experts/TASK/expert.ckpt       an expert for each task, from the foundations in turn
    output/seed 0/merged/2/done                  what was measured when the first two tasks' experts are merged
    output/results.jsonl, table.md, table.tex, table.csv, report.html
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Literal

from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor

from lightning_merge.align.foundations import Aligned
from lightning_merge.align.symmetries import Symmetries
from lightning_merge.checkpoints import Weights, open_weights
from lightning_merge.checkpoints.names import matches
from lightning_merge.data import DomainDataModule
from lightning_merge.evaluation.benchmark.foundations_table import FoundationsTable
from lightning_merge.evaluation.benchmark.options import Foundations
from lightning_merge.evaluation.candidates import Record, evaluate_candidates
from lightning_merge.evaluation.engines import Engine, Sequential
from lightning_merge.evaluation.jobs import (
    Job,
    JobList,
    claim_output,
    fit_expert,
    is_done,
    mark_done,
    names_of,
    read_done,
    settings_of,
)
from lightning_merge.evaluation.merge_data import calibration_images, on_device
from lightning_merge.evaluation.repeatable_trainer import RepeatableTrainer
from lightning_merge.evaluation.task_models import model_of_task, start_from, unfolded
from lightning_merge.merging.aligning import Align, align, find_groups
from lightning_merge.merging.merge import merge
from lightning_merge.merging.repairing import repair
from lightning_merge.methods import MergeMethod
from lightning_merge.repair import Correction, insert
from lightning_merge.repair.calibration import Known
from lightning_merge.repair.corrections import state_of
from lightning_merge.utilities.errors import raise_all

_OWN = "own expert"


@dataclass
class FoundationsBenchmark(JobList):
    """The jobs of a benchmark over several foundations.

    Args:
        trainer: Fits and evaluates.
        model: The module of foundations and experts, as it is configured; its weights are not used.
        datamodule: The data of all tasks.
        methods: The methods to compare, by name.
        output: The folder for everything.
        domains: The tasks of the experts.
        options: How.
        engine: Where the jobs are done.
    """

    trainer: RepeatableTrainer
    model: LightningModule
    datamodule: DomainDataModule
    methods: Mapping[str, MergeMethod]
    output: Path
    domains: Sequence[str]
    options: Foundations
    engine: Engine = field(default_factory=Sequential)

    def run(self) -> FoundationsTable:
        """Do every job that is not done, and write the results."""
        self._check()
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        settings = {
            **settings_of(self.trainer, self.model, self.datamodule),
            "foundations": {k: v for k, v in asdict(self.options).items() if k not in ("merged", "seeds")},
            "methods": {name: method.describe() for name, method in self.methods.items()},
            "domains": list(self.domains),
            "seed": seed,
        }
        del settings["weights"]
        claim_output(self.output, settings, write=self.trainer.is_global_zero)
        self.engine.run(self, seed)
        return self.write_results()

    def jobs(self) -> list[Job]:
        """For every seed the foundations, the experts, and what becomes of the first two, three, … of them."""
        return [job for study in self.options.seeds for job in self._jobs(study)]

    def _jobs(self, study: int) -> list[Job]:
        def job(name: str, work: Callable[..., None], index: int, *folders: str, after: Sequence[str] = ()) -> Job:
            done = partial(is_done, self._folder(study).joinpath(*folders))
            return Job(f"seed {study}, {name}", partial(work, study, index), done, after)

        foundations = {
            name: job(f"foundation {name}", self.fit_foundation, i, "foundations", name)
            for i, name in enumerate(self.names)
        }
        origin = self.foundation_of(self.used)
        experts = [
            job(f"expert {task}", self.fit_expert, i, "experts", task, after=[foundations[origin[task]].name])
            for i, task in enumerate(self.used)
        ]
        every = names_of(foundations.values())
        measured = [
            job(f"{n} tasks", self.measure, n, "merged", str(n), after=[*every, *names_of(experts[:n])])
            for n in self.options.merged
        ]
        return [*foundations.values(), *experts, *measured]

    @property
    def names(self) -> list[str]:
        """The names of the foundations: a, b, …."""
        return list(ascii_lowercase[: self.options.count])

    @property
    def used(self) -> list[str]:
        """The tasks whose experts are needed."""
        return list(self.domains)[: max(self.options.merged)]

    def foundation_of(self, tasks: Sequence[str]) -> dict[str, str]:
        """The foundation of every task's expert: they take turns."""
        return {task: self.names[i % len(self.names)] for i, task in enumerate(tasks)}

    @cached_property
    def symmetries(self) -> Symmetries:
        """The permutation groups of the model."""
        return find_groups(self.model)

    # The jobs

    def fit_foundation(self, study: int, index: int) -> None:
        """Fit a foundation from random weights of its own seed."""
        folder = self._folder(study) / "foundations" / self.names[index]
        seed_everything(1000 * study + index, workers=True, verbose=False)
        first = self.options.domains[0]
        model = model_of_task(self.model, self.datamodule, first, self.options.hparams)
        epochs = {"max_epochs": self.options.max_epochs} if self.options.max_epochs else {}
        fit_expert(self.trainer, model, self.datamodule, self.options.domains, folder, **epochs)

    def fit_expert(self, study: int, index: int) -> None:
        """Fit a task's expert from its foundation, with a head of its own."""
        task = self.used[index]
        folder = self._folder(study) / "experts" / task
        seed_everything(1000 * study + 100 + index, workers=True, verbose=False)
        model = model_of_task(self.model, self.datamodule, task)
        start_from(model, self._foundation(study, self.foundation_of(self.used)[task]), self.options.private)
        fit_expert(self.trainer, model, self.datamodule, [task], folder)

    def measure(self, study: int, count: int) -> None:
        """Merge the first experts in every way and test the models on every task."""
        folder = self._folder(study) / "merged" / str(count)
        tasks = self.used[:count]
        experts = {task: open_weights(self._folder(study) / "experts" / task / "expert.ckpt") for task in tasks}
        candidates: dict[str, dict[str, Mapping[str, Tensor]]] = {task: {_OWN: experts[task]} for task in tasks}
        inserted = {task: Correction() for task in tasks}  # what the weights cannot hold, in any of the models
        for arm, method, task, weights, rest in self._models(study, tasks, experts):
            candidates[task][f"{arm}/{method}"] = weights
            inserted[task] = inserted[task].updated_by(rest.identity())
        records = []
        for task in tasks:
            data = self.datamodule.only(train=[], test=[task], test_on=self.datamodule.test_on)
            model = model_of_task(self.model, self.datamodule, task)
            nothing = state_of(model, inserted[task])
            rows = {row: {**nothing, **weights} for row, weights in candidates[task].items()}
            measured = evaluate_candidates(self.trainer.again(), insert(model, inserted[task]), data, rows)
            found = {record["row"]: record["accuracy"] for record in measured}
            records += [
                {
                    "seed": study,
                    "merged": count,
                    "arm": arm,
                    "method": method,
                    "task": task,
                    "accuracy": found[f"{arm}/{method}"],
                    "expert": found[_OWN],
                }
                for arm in self.options.arms
                for method in self.methods
            ]
        if self.trainer.is_global_zero:
            mark_done(folder, {"records": records})
        self.trainer.strategy.barrier()

    def _models(
        self, study: int, tasks: Sequence[str], experts: Mapping[str, Weights]
    ) -> Iterator[tuple[str, str, str, Mapping[str, Tensor], Correction]]:
        """Every model: its arm, its method, the task, the weights for it, and the corrections to be inserted."""
        options, module = self.options, on_device(self.trainer, self.model)
        data = calibration_images("The benchmark", self.datamodule, tasks, module, options.batches, options.batch_size)
        for kind in dict.fromkeys(arm.align for arm in options.arms.values()):
            aligned = self._align(kind, study, tasks, experts, data)
            known: dict[Any, Known] = {}
            for name, method in self.methods.items():
                merged = merge(aligned.base, aligned.experts, method, exclude=options.private, seed=study)
                for row, arm in options.arms.items():
                    if arm.align != kind:
                        continue
                    repaired = merged
                    if arm.repair is not None:
                        repaired = repair(arm.repair, merged, module, data, seed=study, known=known)
                    for task in tasks:
                        weights = repaired.for_task(task)
                        yield row, name, task, weights, unfolded(self.model, repaired, task, weights)

    def _align(
        self,
        by: Literal["weights", "activations", "nothing"],
        study: int,
        tasks: Sequence[str],
        experts: Mapping[str, Weights],
        data: Mapping[str, Sequence[Any]],
    ) -> Aligned:
        paths = {name: str(self._foundation(study, name).path) for name in self.names}
        options = Align(paths, self.foundation_of(tasks), by=by, restarts=self.options.restarts)
        return align(
            options,
            experts,
            self.model,
            data,
            private=self.options.private,
            symmetries=None if by == "nothing" else self.symmetries,
            seed=study,
        )

    # What is on disk

    def _folder(self, study: int) -> Path:
        return self.output / f"seed {study}"

    def _foundation(self, study: int, name: str) -> Weights:
        return open_weights(self._folder(study) / "foundations" / name / "expert.ckpt")

    def write_results(self) -> FoundationsTable:
        """Write ``results.jsonl`` and the tables from what was measured, and return the table."""
        records: list[Record] = []
        for study in self.options.seeds:
            for count in self.options.merged:
                records += read_done(self._folder(study) / "merged" / str(count))["records"]
        table = FoundationsTable(records)
        if self.trainer.is_global_zero:
            table.save(self.output)
        return table

    def _check(self) -> None:
        self.engine.check(self.trainer)
        options, known, state = self.options, self.datamodule.domains, self.model.state_dict()
        problems = [
            f"There is no task {domain!r}; the tasks are {', '.join(known)}."
            for domain in [*self.domains, *options.domains]
            if domain not in known
        ]
        problems += [
            f"The foundations would be fitted on {domain!r}, which an expert is of; take it out of one."
            for domain in options.domains
            if domain in self.domains
        ]
        for name, values in (("domains", self.domains), ("foundations.seeds", options.seeds)):
            if len(set(values)) < len(values):
                problems.append(f"{name} holds a value twice: {', '.join(map(str, values))}.")
        for name, method in self.methods.items():
            if method.needs or method.needs_data:
                problems.append(f"The method {name!r} needs statistics or images while it merges; leave it out here.")
            repairs = [arm.repair for arm in options.arms.values() if arm.repair]
            problems += list(dict.fromkeys(line for one in repairs for line in one.problems_with(method)))
        for name, arm in options.arms.items():
            problems += [f"The way {name!r}: {problem}" for problem in (arm.repair.problems() if arm.repair else [])]
            if arm.repair and arm.repair.by == "batch_norm" and not any("running_var" in key for key in state):
                problems.append(f"The way {name!r}: the model has no BatchNorm with running statistics to re-estimate.")
        if options.batches < 1 or options.batch_size < 2:
            problems.append("foundations.batches must be at least 1, and foundations.batch_size at least 2.")
        if self.datamodule.test_on == "all":
            problems.append("Experts are tested on their own tasks, which they were trained on; use test_on=test.")
        if not options.domains:
            problems.append("Say what the foundations are fitted on: foundations.domains.")
        if not self.methods:
            problems.append("There are no methods to compare; give at least one.")
        if not options.arms:
            problems.append("There is no way to merge to compare; give foundations.arms.")
        if not 1 <= options.count <= len(ascii_lowercase):
            problems.append(f"There can be 1 to {len(ascii_lowercase)} foundations, not {options.count}.")
        if not options.merged or min(options.merged) < 1 or max(options.merged) > len(self.domains):
            problems.append(
                f"foundations.merged says how many of the {len(self.domains)} tasks are merged; got "
                f"{list(options.merged)}."
            )
        if not options.seeds:
            problems.append("Give at least one seed: foundations.seeds.")
        if self.trainer.arguments.get("limit_test_batches") == 0:
            problems.append("Nothing would be tested; leave limit_test_batches out.")
        if not any(matches(name, options.private) for name in state):
            problems.append(
                f"No parameter of the model matches foundations.private ({', '.join(options.private)}); it has "
                f"{', '.join(list(state)[-3:])}."
            )
        raise_all(problems)
        self.datamodule.check([*self.used, *options.domains])
