"""The verb ``benchmark``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule

from lightning_merge.checkpoints.paths import path_here
from lightning_merge.data import DomainDataModule
from lightning_merge.evaluation import Table
from lightning_merge.evaluation.benchmark.foundations import FoundationsBenchmark
from lightning_merge.evaluation.benchmark.foundations_table import FoundationsTable
from lightning_merge.evaluation.benchmark.leave_one_out import Benchmark
from lightning_merge.evaluation.benchmark.options import Foundations, Pretrain
from lightning_merge.evaluation.engines import Engine, make_engine
from lightning_merge.evaluation.statistics.collect import Recipe
from lightning_merge.methods import MergeMethod
from lightning_merge.report.writing import (
    report_benchmark,
)
from lightning_merge.trainer.verbs.reporting import ReportingTrainer
from lightning_merge.trainer.verbs.search import GridValue
from lightning_merge.utilities.errors import MergeError


class BenchmarkVerb(ReportingTrainer):
    """The verb ``benchmark``."""

    def benchmark(
        self,
        model: LightningModule | None = None,
        datamodule: DomainDataModule | None = None,
        methods: dict[str, MergeMethod] | None = None,
        output: str = "results/benchmark",
        domains: list[str] | None = None,
        pretrain: Pretrain | None = None,
        statistics: Recipe | None = None,
        search: dict[str, dict[str, list[GridValue]]] | None = None,
        foundations: Foundations | None = None,
        engine: Literal["ray", "slurm"] | Engine | None = None,
        report: bool = True,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Table | FoundationsTable:
        """Leave each domain out in turn: merge the other domains' experts by every method and evaluate on it.

        Experts that are missing are fitted with this trainer's settings; what is done already is not done again.
        Methods that run the model while they merge see the training images of the domains that are merged, without
        labels, and never the domain that is left out (AdaMerging's paper adapts on the images it is tested on).

        Args:
            model: The module of every expert, as it is before any fit.
            datamodule: The data of all domains. With ``test_on: all`` a held-out domain is evaluated as a whole.
            methods: The methods to compare, by the name of their row.
            output: The folder for experts, results.jsonl, report.html, table.md, table.tex and table.csv.
            domains: The domains that take part: each has an expert, and is left out in turn while the experts of the
                others are merged; by default all but those of the base.
            pretrain: Fit the base first, on domains of its own; by default the model as it is configured is the base.
            statistics: How the experts' statistics are collected, for methods that need them; the kinds are theirs.
            search: Methods whose fields are chosen first, on the validation splits of the domains that are merged: the
                name of the row, and for every field the values to try, ``{}`` for the scaling coefficients 0.1 to 3.
            foundations: Leave no domain out: fit several foundations, take the domains for tasks whose experts are
                fitted from the foundations in turn, merge them in several ways, and test on the tasks of the experts.
            engine: Who does the jobs: ``ray``, ``slurm``, or one of these with options (``Ray`` and ``Slurm``, such as
                ``--engine Ray --engine.gpus 1``); by default this process, one after another.
            report: Also write report.html: the tables, figures, and what the experts have in common.
            ckpt_path: Not used; here so that the config.yaml of a fit can be read.
            weights_only: Not used; checkpoints are never unpickled beyond weights.

        Returns:
            The table of accuracies.
        """
        if model is None or not isinstance(datamodule, DomainDataModule):
            raise MergeError("A benchmark needs a model and data of several domains; give --model and --data.")
        folder = path_here(output, "A benchmark")
        if foundations is not None:
            others = {"pretrain": pretrain, "search": search, "statistics": statistics}
            with self.progress_shown():
                self.table = self._benchmark_foundations(
                    model, datamodule, methods, folder, domains, foundations, others, engine
                )
            self._publish(report_benchmark if report else None, folder)
            return self.table
        base_domains = pretrain.domains if pretrain else ()
        job_list = Benchmark(
            trainer=self,
            model=model,
            datamodule=datamodule,
            methods=methods or {},
            output=folder,
            domains=domains or [domain for domain in datamodule.domains if domain not in base_domains],
            pretrain=pretrain,
            statistics=statistics,
            search=search or {},
            engine=make_engine(engine),
        )
        with self.progress_shown():
            self.table = job_list.run()
        self._publish(partial(report_benchmark, updates=job_list.updates()) if report else None, folder)
        return self.table

    def _benchmark_foundations(
        self,
        model: LightningModule,
        datamodule: DomainDataModule,
        methods: Mapping[str, MergeMethod] | None,
        folder: Path,
        domains: Sequence[str] | None,
        options: Foundations,
        others: Mapping[str, Any],
        engine: Literal["ray", "slurm"] | Engine | None,
    ) -> FoundationsTable:
        """Run the benchmark over several foundations, in which the ``others`` of the verb's options have no place."""
        unused = [name for name, value in others.items() if value]
        if unused:
            raise MergeError(f"`{unused[0]}` belongs to a benchmark of one base; leave it or `foundations` out.")
        tasks = [domain for domain in datamodule.domains if domain not in options.domains]
        return FoundationsBenchmark(
            self,
            model,
            datamodule,
            methods or {},
            folder,
            domains or tasks,
            options,
            make_engine(engine),
        ).run()
