"""The verb ``search``."""

from __future__ import annotations

from functools import partial

from lightning.pytorch import LightningModule

from lightning_merge.checkpoints import check_suffix
from lightning_merge.checkpoints.paths import path_here
from lightning_merge.data import DomainDataModule
from lightning_merge.evaluation.jobs import quiet_lightning
from lightning_merge.evaluation.search import Found, row_name, search_coefficients
from lightning_merge.methods import SCORE, MergeMethod
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.report.writing import (
    report_search,
)
from lightning_merge.trainer.verbs.reporting import ReportingTrainer
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.processes import processes_of_run

GridValue = int | float | bool | str


class SearchVerb(ReportingTrainer):
    """The verb ``search``."""

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
        """Merge by every setting of a grid; write what is best on the validation splits of the experts' domains.

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
        folder = path_here(results, "A search")
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
                folder,
                statistics=statistics,
                include=include,
                exclude=exclude or (),
                matrices=matrices,
                seed=seed,
                workers=workers,
            )
        self.merged, self.table = self.found.merged, self.found.table
        with processes_of_run().together():
            if self.is_global_zero:
                self.merged.save(output)
        setting, name = row_name(self.found.setting), type(self.found.method).__name__
        self._publish(partial(report_search, chosen=setting, method=name), folder)
        return self.found
