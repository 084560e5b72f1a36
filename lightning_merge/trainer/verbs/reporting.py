"""The base class of all verbs: their results on the trainer, progress, and reports."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lightning_merge.evaluation.repeatable_trainer import RepeatableTrainer
from lightning_merge.evaluation.search import Found
from lightning_merge.merging.merged import Merged
from lightning_merge.merging.plan import Plan
from lightning_merge.report.loggers import log_to_loggers
from lightning_merge.report.page import Page
from lightning_merge.report.writing import REPORT
from lightning_merge.utilities.processes import processes_of_run
from lightning_merge.utilities.progress import show_progress


class ReportingTrainer(RepeatableTrainer):
    """Trainer whose verbs write reports and log to its loggers."""

    configuration: str = ""
    """The YAML that the command line was given, for reports."""
    report: Path | None = None
    """The report that was written last."""
    plan: Plan | None = None
    """The plan that the verb ``merge`` made last, with ``plan=True``."""
    merged: Merged | None = None
    """The model that was merged last."""
    table: Any = None
    """The table that was made last."""
    found: Found | None = None
    """What the verb ``search`` found last."""
    recorded: Path | None = None
    """The file of statistics that was written last."""

    def progress_shown(self) -> AbstractContextManager[None]:
        """Show the progress of a verb, unless this trainer has no progress bar."""
        return show_progress(self.progress_bar_callback is not None)

    def _publish(self, report: Callable[..., Page] | None, folder: Path) -> None:
        """Write the report of a table into its folder, and both to the loggers that were given."""
        with processes_of_run().together():
            if self.is_global_zero:
                figures = {}
                if report is not None:
                    figures = report(self.table, folder, configuration=self.configuration).figures
                    self.report = folder / REPORT
                log_to_loggers(self.given_loggers, self.table, figures)
