"""Lightning's Trainer with more verbs: those that merge, and those that tell what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lightning_merge.aligning import Align
from lightning_merge.analysis import Comparison, compare_experts
from lightning_merge.checkpoints import check_suffix, open_weights, write_text
from lightning_merge.collect_statistics import Kind, Recipe
from lightning_merge.data import DomainDataModule
from lightning_merge.errors import MergeError
from lightning_merge.evaluation import Table, evaluate_domain
from lightning_merge.evaluation.benchmark import Benchmark, Pretrain
from lightning_merge.evaluation.candidates import check_fit
from lightning_merge.evaluation.engines import Engine, make_engine
from lightning_merge.evaluation.foundations import Foundations, FoundationsBenchmark
from lightning_merge.evaluation.foundations_table import FoundationsTable
from lightning_merge.evaluation.held_out import BASE, check_names
from lightning_merge.evaluation.jobs import quiet_lightning
from lightning_merge.evaluation.merge_data import module_and_data
from lightning_merge.evaluation.search import Found, row_name, search_coefficients
from lightning_merge.evaluation.several_foundations import SeveralFoundations
from lightning_merge.evaluation.task_models import evaluate_merged
from lightning_merge.folders import is_folder
from lightning_merge.lora import open_expert
from lightning_merge.matrices import Matrices
from lightning_merge.merged import Merged
from lightning_merge.merging import check_arguments, merge, open_experts
from lightning_merge.methods import SCORE, MergeMethod
from lightning_merge.planning import plan as make_plan
from lightning_merge.plans import Plan
from lightning_merge.progress import show_progress
from lightning_merge.recording import record_statistics
from lightning_merge.repairing import Repair
from lightning_merge.report.experts import experts_grid
from lightning_merge.report.loggers import log_to_loggers
from lightning_merge.report.model_card import CARD, check_card
from lightning_merge.report.page import Page
from lightning_merge.report.writing import (
    REPORT,
    check_report,
    report_analysis,
    report_benchmark,
    report_merge,
    report_search,
)
from lightning_merge.sharing import Processes
from lightning_merge.statistics import statistics_file
from lightning_merge.streaming import SHARD_SIZE
from lightning_merge.task_vector_files import is_task_vector

GridValue = int | float | bool | str


class _KnowsItsArguments:
    """Keeps what it was called with: all of it, whatever constructors stand between this class and ``Trainer``'s.

    It is a base class of its own because jsonargparse takes a class that defines ``__new__`` for one whose arguments
    are those of ``__new__``.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        self.positional, self.arguments = args, dict(kwargs)
        if isinstance(kwargs.get("callbacks"), list):
            self.arguments["callbacks"] = list(kwargs["callbacks"])  # Lightning adds its own to the list it is given
        return self


class MergeTrainer(_KnowsItsArguments, Trainer):
    """A ``Trainer`` that can also merge experts, search coefficients, evaluate merged models, and benchmark methods.

    A project with a Trainer of its own writes ``class Ours(MergeTrainer, Theirs): pass``.
    """

    configuration: str = ""
    """The YAML that the command line was given, for reports."""
    report: Path | None = None
    """The report that was written last."""

    @property
    def given_callbacks(self) -> list[Callback]:
        """The callbacks that were given, without those that Lightning or its command line added."""
        given = self.arguments.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        return [callback for callback in given if not isinstance(callback, SaveConfigCallback)]

    @property
    def given_loggers(self) -> list[Logger]:
        """The loggers that were given, without the one that Lightning makes where nothing is said."""
        given = self.arguments.get("logger")
        given = given if isinstance(given, (list, tuple)) else [given]
        return [logger for logger in given if isinstance(logger, Logger)]

    def again(self, callbacks: Sequence[Callback] = (), **changes: Any) -> MergeTrainer:
        """A new trainer with the same arguments, for one job among many: no progress bar, no logger, no checkpoints.

        Args:
            callbacks: Its callbacks. Checkpoints are written only if a ``ModelCheckpoint`` is among them.
            changes: Arguments that differ.
        """
        from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
        quiet = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        }
        return type(self)(*self.positional, **{**self.arguments, **quiet, "callbacks": callbacks, **changes})

    def progress_shown(self) -> AbstractContextManager[None]:
        """Show how far a verb has come, unless this trainer is to have no progress bar."""
        return show_progress(self.progress_bar_callback is not None)

    def merge(
        self,
        model: LightningModule | None = None,
        datamodule: DomainDataModule | None = None,
        experts: dict[str, str] | list[str] | None = None,
        method: MergeMethod | None = None,
        base: str | None = None,
        statistics: dict[str, str] | None = None,
        output: str = "merged.ckpt",
        scale: float | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        matrices: Matrices = Matrices(),  # noqa: B008, a frozen dataclass
        seed: int = 0,
        workers: int | None = None,
        allow_non_finite: bool = False,
        resume: bool = False,
        shard_size: int = SHARD_SIZE,
        plan: bool = False,
        align: Align | None = None,
        repair: Repair | None = None,
        report: str | None = None,
        card: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Merged | Plan:
        """Merge experts' checkpoints into one.

        Args:
            model: The experts' module, as it is before any fit: the base, unless a file is given as base.
            datamodule: If it is a :class:`DomainDataModule` and there is a model, the merged model is evaluated on its
                test domains. Methods that run the model while they merge (AdaMerging, RegMean++) do so on the training
                images of the domains that the experts are named after, without their labels.
            experts: The experts' checkpoints, run folders, LoRA adapters or task vectors: a list, or a mapping from a
                name (domain) to a path.
            method: The merging method; SCORE by default.
            base: The checkpoint that the experts started from; by default the model as it is configured.
            statistics: Where the statistics of each expert's data are, by its name, for methods that need them; by
                default beside the experts' checkpoints, where the verb ``statistics`` writes them.
            output: The file to write: .ckpt, .safetensors or .pt; without a suffix, a folder as Hugging Face, timm and
                open_clip write them, with what lies beside the base's weights and a model card.
            scale: Scaling coefficient; by default the method's own.
            include: Merge only the parameters whose name matches one of these shell patterns.
            exclude: Do not merge the parameters that match one of these shell patterns.
            matrices: Which parameters count as matrices.
            seed: Seed of methods that draw random numbers.
            workers: Parameters that are merged at the same time, each on one core; by default one for each core, at
                most eight. With several processes (``--trainer.devices``, torchrun) each has its part of them.
            allow_non_finite: Merge weights that hold NaN or infinite values instead of refusing them.
            resume: Go on where an earlier run of the same merge into the same output was interrupted, and keep what is
                finished if this one is; all inputs must be files.
            shard_size: The most bytes of one file where the output is a folder.
            plan: Only say what would be merged, what stands in the way, and about what it costs, from the files'
                headers; nothing is merged or written. The exit status is 1 if anything stands in the way.
            align: For experts of several foundations: put their channels into one order first. The base is the mean of
                the foundations then.
            repair: What is corrected once the model is merged, on training images of the domains that the experts are
                named after: REPAIR, TACT, BatchNorm's statistics, or the experts' heads.
            report: An HTML file to write: where the experts agree, what the merge did to each layer, the scores, and
                what went in, see the verb ``analyze``.
            card: Also write a model card to this file (.md): method, experts, scores, and how to make the model again.
                An output that is a folder has one in any case, README.md.
            ckpt_path: Not used; here so that the config.yaml of a fit can be read.
            weights_only: Not used; checkpoints are never unpickled beyond weights.

        Returns:
            The merged model; its ``manifest`` says how it was made. Or the plan.
        """
        if not experts:
            raise MergeError("There is nothing to merge: give the experts' checkpoints with --experts.")
        if base is None and model is None and align is None:
            raise MergeError(
                "The experts are merged as differences to a base; give it with --base, or give the --model."
            )
        check_report(report)
        if card is not None:
            check_card(card)
        method = method or SCORE()
        domains = datamodule if isinstance(datamodule, DomainDataModule) else None
        several = SeveralFoundations(self, model, domains, align, repair, tuple(exclude or ()), seed)
        several.check(experts, base, method, resume)
        distributed = not plan and self._join_processes()
        if align is not None:
            source, experts = several.align(experts, plan, distributed)
        else:
            source = base if base is not None else model.state_dict()
        options = {
            "statistics": statistics,
            "scale": scale,
            "include": include,
            "exclude": exclude or (),
            "matrices": matrices,
            "seed": seed,
            "workers": workers,
            "allow_non_finite": allow_non_finite,
            "output": output,
            "resume": resume,
            "shard_size": shard_size,
            **module_and_data(self, model, domains, method, experts),
        }
        self.plan = make_plan(source, experts, method, **options) if plan else None
        if self.plan is not None:
            return self.plan
        origin = open_weights(source, name="base")
        if repair is not None:
            with Processes(distributed).together():
                check_arguments(method, origin, open_experts(experts, origin), output=output, shard_size=shard_size)
            options["output"] = None
        with self.progress_shown():
            merged = merge(origin, experts, method, distributed=distributed, **options)
        if repair is not None:
            merged = several.repair(merged, distributed)
        with Processes(distributed).together():
            if self.is_global_zero:
                several.save(merged, output, shard_size)
        self.merged, self.table = merged, None
        if model is not None and domains is not None:
            self.table = Table(evaluate_merged(self, model, domains, origin, merged))
        with Processes(distributed).together():
            if self.is_global_zero:
                self._describe(merged, output, report, card, workers)
        return merged

    def _describe(self, merged: Merged, output: str, report: str | None, card: str | None, workers: int | None) -> None:
        """Write what people read of a merged model: its model card, and its report."""
        cards = [card] if card is not None else []
        if self.table is not None and is_folder(output):
            cards.append(Path(output, CARD))  # the one there knows no scores
        for path in cards:
            write_text(Path(path).expanduser(), str(merged.card(self.table, output)))
        figures = {}
        if report is not None:
            with self.progress_shown():
                figures = report_merge(merged, report, self.table, self.configuration, workers).figures
            self.report = Path(report)
        log_to_loggers(self.given_loggers, self.table, figures)

    def _join_processes(self) -> bool:
        """Start the other processes of this run, or meet them, and say whether there are any to share work with.

        Processes that are forked for one call and end with it (``ddp_spawn``, ``ddp_fork``) are not started for it.
        """
        launcher = self.strategy.launcher
        if self.world_size == 1 or not isinstance(launcher, _SubprocessScriptLauncher):
            return False
        launcher.launch(self.strategy.setup_environment)
        return torch.distributed.is_initialized()

    def statistics(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        expert: str | None = None,
        kinds: list[Kind] = ["fisher", "gram"],  # noqa: B006, not changed
        batches: int | None = None,
        fisher: Literal["example", "batch"] = "example",
        labels: Literal["expected", "true", "argmax"] = "expected",
        output: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Path:
        """Collect what an expert's training data say about it, for Fisher, RegMean, MaTS and TACT.

        Args:
            model: The expert's module; its own weights are not used.
            datamodule: The expert's data; its training data are used, without augmentation where it knows how.
            expert: The expert's checkpoint or run folder.
            kinds: ``fisher``: the diagonal Fisher information of every parameter (for Fisher). ``gram``: the Gram
                matrix of the inputs of every linear layer (for RegMean). ``gram_out``: that of the gradients at its
                outputs (with ``gram`` for MaTS). ``moments``: mean and variance of every channel of the activations
                that TACT corrects (for ``merge`` with repair.by=tact and repair.recorded).
            batches: How many batches; by default all.
            fisher: ``example``: the mean of the squared gradients of single examples. ``batch``: of the gradients of
                batches' means, faster and cruder.
            labels: ``expected``: the expectation over the model's own predictions. ``true``: the data's labels.
                ``argmax``: the predicted ones.
            output: The file to write; by default NAME.statistics.safetensors beside the checkpoint NAME.ckpt, where
                the verb ``merge`` finds it.
            ckpt_path: Not used; here so that the config.yaml of a fit can be read.
            weights_only: Not used; checkpoints are never unpickled beyond weights.

        Returns:
            The file that was written.
        """
        if model is None or datamodule is None or expert is None:
            raise MergeError(
                "Statistics need an expert, its model and its data; give --expert, and the config.yaml of its fit."
            )
        if is_task_vector(expert):
            raise MergeError(
                f"{expert} is a task vector; collect the statistics of the checkpoint that it was taken from: beside "
                "that they are found for both."
            )
        weights = open_weights(expert)
        check_fit(model, {expert: weights})
        recipe = Recipe(tuple(kinds), fisher, labels, batches)
        self.recorded = Path(output) if output is not None else statistics_file(weights)
        record_statistics(self, model, datamodule, weights, recipe, self.recorded)
        return self.recorded

    def search(
        self,
        model: LightningModule | None = None,
        datamodule: DomainDataModule | None = None,
        experts: dict[str, str] | None = None,
        method: MergeMethod | None = None,
        grid: dict[str, list[GridValue]] | None = None,
        base: str | None = None,
        output: str = "merged.ckpt",
        results: str = "results/search",
        patience: int | None = 3,
        at_once: int = 4,
        statistics: dict[str, str] | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        matrices: Matrices = Matrices(),  # noqa: B008, a frozen dataclass
        seed: int = 0,
        workers: int | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Found:
        """Merge by every setting of a grid and write what is best on the validation splits of the experts' domains.

        The best has the highest accuracy in relation to that of each domain's own expert, averaged over the domains.
        No test split and no held-out domain is looked at.

        Args:
            model: The experts' module, as it is before any fit: the base, unless a file is given as base.
            datamodule: The data; it holds the experts' domains.
            experts: The experts' checkpoints or run folders by the name of their domain.
            method: The merging method; SCORE by default.
            grid: The values to try for every field of the method; by default the scaling coefficients 0.1, 0.2, …, 3.
                A field of the method inside another one is written as ``method.density``.
            base: The checkpoint that the experts started from; by default the model as it is configured.
            output: The file to write: .ckpt, .safetensors or .pt.
            results: The folder for the table of all settings: report.html, results.jsonl, table.md, .tex and .csv.
            patience: Go on to the next setting of the other fields once this many coefficients in a row have not
                raised the mean accuracy; null tries all of them.
            at_once: Merged models that are in memory and evaluated at the same time.
            statistics: Statistics of the experts' data by domain, for methods that need them.
            include: Merge only the parameters whose name matches one of these shell patterns.
            exclude: Do not merge the parameters that match one of these shell patterns.
            matrices: Which parameters count as matrices.
            seed: Seed of methods that draw random numbers.
            workers: Parameters that are merged at the same time; by default one for each core, at most eight.
            ckpt_path: Not used; here so that the config.yaml of a fit can be read.
            weights_only: Not used; checkpoints are never unpickled beyond weights.

        Returns:
            The best setting, the model merged by it, and the table.
        """
        if model is None or datamodule is None:
            raise MergeError("Searching needs a model and data; give --model and --data, or the config.yaml of a fit.")
        check_suffix(output)
        with quiet_lightning(), self.progress_shown():
            self.found = search_coefficients(
                self,
                model,
                datamodule,
                base if base is not None else model.state_dict(),
                experts or {},
                method or SCORE(),
                grid,
                patience,
                at_once,
                results,
                statistics=statistics,
                include=include,
                exclude=exclude or (),
                matrices=matrices,
                seed=seed,
                workers=workers,
            )
        self.merged, self.table = self.found.merged, self.found.table
        if self.is_global_zero:
            self.merged.save(output)
        chosen = {"chosen": row_name(self.found.setting), "method": type(self.found.method).__name__}
        self._publish(partial(report_search, **chosen), Path(results))
        return self.found

    def evaluate(
        self,
        model: LightningModule | None = None,
        datamodule: DomainDataModule | None = None,
        candidates: dict[str, str] | None = None,
        experts: dict[str, str] | None = None,
        base: str | None = None,
        output: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Table:
        """Evaluate several checkpoints side by side, in one pass over each test domain.

        Args:
            model: The module that the checkpoints belong to; as it is configured, it is the row "base".
            datamodule: The data; its test domains are the columns.
            candidates: Checkpoints to compare, by the name of their row.
            experts: Experts' checkpoints by domain, for the rows "own expert" and "logit ensemble" (of the others).
            base: Weights of the row "base", if they are not those of the model as configured.
            output: A folder for table.md, table.tex and table.csv.
            ckpt_path: Not used; here so that the config.yaml of a fit can be read.
            weights_only: Not used; checkpoints are never unpickled beyond weights.

        Returns:
            The table.
        """
        if model is None or datamodule is None:
            raise MergeError("Evaluating needs a model and data; give --model and --data, or the config.yaml of a fit.")
        if not isinstance(datamodule, DomainDataModule):
            raise MergeError(
                f"{type(datamodule).__name__} says nothing of domains; evaluate with a DomainDataModule "
                "(DomainFolders, or your subclass), or test one checkpoint at a time with `test --ckpt_path`."
            )
        check_names(candidates or {})
        rows = {BASE: open_weights(base) if base is not None else model.state_dict()}
        origin = open_weights(rows[BASE], BASE)
        rows |= {name: open_expert(path, origin, name) for name, path in (candidates or {}).items()}
        named = {domain: open_expert(path, origin, f"expert {domain}") for domain, path in (experts or {}).items()}
        self.table = self._evaluate(model, datamodule, rows, named)
        if output is not None and self.is_global_zero:
            self.table.save(output)
        if self.is_global_zero:
            log_to_loggers(self.given_loggers, self.table, {})
        return self.table

    def _evaluate(self, model, datamodule, rows, experts) -> Table:
        records = []
        for domain in datamodule.test_domains:
            records += evaluate_domain(self, model, datamodule, domain, rows, experts)
        return Table(records)

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
        if foundations is not None:
            others = {"pretrain": pretrain, "search": search, "statistics": statistics}
            with self.progress_shown():
                self.table = self._benchmark_foundations(
                    model, datamodule, methods, output, domains, foundations, others, engine
                )
            self._publish(report_benchmark if report else None, Path(output))
            return self.table
        base_domains = pretrain.domains if pretrain else ()
        job_list = Benchmark(
            trainer=self,
            model=model,
            datamodule=datamodule,
            methods=methods or {},
            output=Path(output),
            domains=domains or [domain for domain in datamodule.domains if domain not in base_domains],
            pretrain=pretrain,
            statistics=statistics,
            search=search or {},
            engine=make_engine(engine),
        )
        with self.progress_shown():
            self.table = job_list.run()
        self._publish(partial(report_benchmark, updates=job_list.updates()) if report else None, Path(output))
        return self.table

    def _publish(self, report: Callable[..., Page] | None, folder: Path) -> None:
        """Write the report of a table into its folder, and both to the loggers that were given."""
        if self.is_global_zero:
            figures = {}
            if report is not None:
                figures = report(self.table, folder, configuration=self.configuration).figures
                self.report = folder / REPORT
            log_to_loggers(self.given_loggers, self.table, figures)

    def analyze(
        self,
        model: LightningModule | None = None,
        datamodule: LightningDataModule | None = None,
        experts: dict[str, str] | list[str] | None = None,
        base: str | None = None,
        merged: dict[str, str] | list[str] | None = None,
        output: str = "results/analysis",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        matrices: Matrices = Matrices(),  # noqa: B008, a frozen dataclass
        every_matrix: bool = False,
        workers: int | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Comparison:
        """Show where experts agree and where they are in each other's way, and what merging did to them; needs no data.

        Args:
            model: The experts' module, as it is before any fit: the base, unless a file is given as base.
            datamodule: Not used; here so that the config.yaml of a fit can be read.
            experts: The experts' checkpoints, run folders, LoRA adapters or task vectors: a list, or a mapping from a
                name (domain) to a path.
            base: The checkpoint that the experts started from; by default the model as it is configured.
            merged: Merged models to look at: a list, or a mapping from a name to a path.
            output: The folder for report.html, the experts' table.md, table.csv and table.tex, and comparison.json.
            include: Look only at the parameters whose name matches one of these shell patterns.
            exclude: Do not look at the parameters that match one of these shell patterns.
            matrices: Which parameters count as matrices.
            every_matrix: Compare the subspaces of all matrices, however long it takes; by default of as many, evenly
                spread over the model, as take about half a minute.
            workers: Parameters that are looked at at the same time; by default one for each core, at most eight.
            ckpt_path: Not used; here so that the config.yaml of a fit can be read.
            weights_only: Not used; checkpoints are never unpickled beyond weights.

        Returns:
            What was found.
        """
        if not experts:
            raise MergeError("There is nothing to look at: give the experts' checkpoints with --experts.")
        if base is None and model is None:
            raise MergeError("Experts are compared as differences to a base; give it with --base, or give the --model.")
        check_report(Path(output) / REPORT)
        with self.progress_shown():
            comparison = compare_experts(
                base if base is not None else model.state_dict(),
                experts,
                merged,
                include=include,
                exclude=exclude or (),
                matrices=matrices,
                every_matrix=every_matrix,
                workers=workers,
            )
        self.table = experts_grid(comparison).markdown()
        if self.is_global_zero:
            page = report_analysis(comparison, output, self.configuration)
            self.report = Path(output) / REPORT
            log_to_loggers(self.given_loggers, None, page.figures)
        return comparison

    def _benchmark_foundations(self, model, datamodule, methods, output, domains, options, others, engine):
        unused = [name for name, value in others.items() if value]
        if unused:
            raise MergeError(f"`{unused[0]}` belongs to a benchmark of one base; leave it or `foundations` out.")
        rest = [domain for domain in datamodule.domains if domain not in options.domains]
        return FoundationsBenchmark(
            self, model, datamodule, methods or {}, Path(output), domains or rest, options, make_engine(engine)
        ).run()
