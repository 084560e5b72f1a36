"""The verb ``analyze``."""

from __future__ import annotations

from lightning.pytorch import LightningDataModule, LightningModule

from lightning_merge.analysis import Comparison, compare_experts
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.report.experts import experts_grid
from lightning_merge.report.loggers import log_to_loggers
from lightning_merge.report.writing import (
    REPORT,
    check_report,
    report_analysis,
)
from lightning_merge.trainer.verbs.reporting import ReportingTrainer
from lightning_merge.utilities.errors import MergeError


class AnalyzeVerb(ReportingTrainer):
    """The verb ``analyze``."""

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
        """Show where experts agree and where they conflict, and what merging did to them; needs no data.

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
            workers: Parameters that are compared at the same time; by default one for each core, at most eight.
            ckpt_path: Not used; here so that the config.yaml of a fit can be read.
            weights_only: Not used; checkpoints are never unpickled beyond weights.

        Returns:
            What was found.
        """
        if not experts:
            raise MergeError("There is nothing to look at: give the experts' checkpoints with --experts.")
        start = base if base is not None or model is None else model.state_dict()
        if start is None:
            raise MergeError("Experts are compared as differences to a base; give it with --base, or give the --model.")
        check_report(local_path(output) / REPORT)
        with self.progress_shown():
            comparison = compare_experts(
                start,
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
            self.report = local_path(output) / REPORT
            log_to_loggers(self.given_loggers, None, page.figures)
        return comparison
