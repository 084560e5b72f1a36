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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from string import ascii_lowercase

from lightning.pytorch import LightningModule, seed_everything

from lightning_merge.align.symmetries import Symmetries
from lightning_merge.checkpoints import Weights, open_weights
from lightning_merge.data import DomainDataModule
from lightning_merge.evaluation.benchmark.foundations_models import measure
from lightning_merge.evaluation.benchmark.foundations_table import FoundationsTable
from lightning_merge.evaluation.benchmark.options import (
    Foundations,
    arm_problems,
    method_problems,
    number_problems,
    private_problems,
    task_problems,
)
from lightning_merge.evaluation.benchmark.records import OfFoundations
from lightning_merge.evaluation.candidates import Record
from lightning_merge.evaluation.engines import Engine, Sequential
from lightning_merge.evaluation.jobs import (
    Job,
    JobList,
    claimed,
    fit_expert,
    is_done,
    mark_done,
    names_of,
    read_done,
    settings_of,
)
from lightning_merge.evaluation.repeatable_trainer import RepeatableTrainer
from lightning_merge.evaluation.task_models import model_of_task, start_from
from lightning_merge.merging.aligning import find_groups
from lightning_merge.methods import MergeMethod
from lightning_merge.utilities.errors import raise_all
from lightning_merge.utilities.processes import processes_of_run


@dataclass
class FoundationsBenchmark(JobList):
    """The jobs of a benchmark over several foundations.

    Args:
        trainer: The trainer whose settings are used to fit and to evaluate.
        model: The module of foundations and experts, as it is configured; its weights are not used.
        datamodule: The data of all tasks.
        methods: The methods to compare, by name.
        output: The folder for everything.
        domains: The tasks of the experts.
        options: Settings of the foundations, and of what is done with their experts.
        engine: The engine that does the jobs.
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
        with claimed(self.trainer, self.output, settings):
            self.engine.run(self, seed)
            return self.write_results()

    def jobs(self) -> list[Job]:
        """List the jobs: for every seed the foundations, the experts, and the merges of the first two, three, …."""
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
        """Return the foundation of every task's expert: they take turns."""
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
        start_from(model, self.foundation(study, self.foundation_of(self.used)[task]), self.options.private)
        fit_expert(self.trainer, model, self.datamodule, [task], folder)

    def measure(self, study: int, count: int) -> None:
        """Merge the first experts in every way and test the models on every task."""
        records = measure(self, study, self.used[:count])
        with processes_of_run().together():
            if self.trainer.is_global_zero:
                mark_done(self._folder(study) / "merged" / str(count), {"records": records})

    # What is on disk

    def _folder(self, study: int) -> Path:
        return self.output / f"seed {study}"

    def foundation(self, study: int, name: str) -> Weights:
        """Open the weights of a foundation."""
        return open_weights(self._folder(study) / "foundations" / name / "expert.ckpt")

    def expert(self, study: int, task: str) -> Weights:
        """Open the weights of a task's expert."""
        return open_weights(self._folder(study) / "experts" / task / "expert.ckpt")

    def write_results(self) -> FoundationsTable:
        """Write ``results.jsonl`` and the tables from what was measured, and return the table."""
        records: list[Record] = []
        for study in self.options.seeds:
            for count in self.options.merged:
                records += read_done(self._folder(study) / "merged" / str(count), OfFoundations)["records"]
        table = FoundationsTable(records)
        with processes_of_run().together():
            if self.trainer.is_global_zero:
                table.save(self.output)
        return table

    def _check(self) -> None:
        """Check everything that can be checked before any job is begun.

        Raises:
            MergeError: If something cannot work; every problem is listed.
        """
        self.engine.check(self.trainer)
        names = list(self.model.state_dict())
        problems = [
            *task_problems(self.options, self.domains, self.datamodule),
            *method_problems(self.options, self.methods),
            *arm_problems(self.options, names),
            *number_problems(self.options, self.domains),
            *private_problems(self.options, names),
        ]
        if self.trainer.arguments.get("limit_test_batches") == 0:
            problems.append("Nothing would be tested; leave limit_test_batches out.")
        raise_all(problems)
        self.datamodule.check([*self.used, *self.options.domains])
