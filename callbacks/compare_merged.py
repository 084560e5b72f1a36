"""Compare merged models with the module's own weights, on its own data and by its own metrics."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning_merge.callbacks.beside_callback import BesideCallback
from torch import Tensor

from lightning_merge.checkpoints import Weights, match_names, open_weights, write_text
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.evaluation.candidates import check_fit
from lightning_merge.methods import MergeMethod
from lightning_merge.models.fitted import check_whole
from lightning_merge.utilities.errors import MergeError, problems_of, raise_all
from lightning_merge.utilities.grid import Cell, Grid
from lightning_merge.utilities.processes import Processes, processes_of_run

CURRENT = "current"
"""The row of the module's own weights."""


class CompareMerged(BesideCallback):
    """Comparison of candidates with the current weights in ``validate`` and ``test``, printed as a table.

    Every candidate is evaluated in the module itself, as ``trainer.validate`` or ``trainer.test`` would do it with its
    weights: these are written into the module's, the module is put back to where its own evaluation began, and
    Lightning's loop calls its hooks, ``setup`` first, while other callbacks rest. So the data are read once for the
    current weights and once for each candidate, in the same order. Afterwards the module is as it was. What the module
    logs as ``NAME`` is logged for the candidate as ``ROW/NAME``, to every logger; what it writes to a logger or a file
    by itself, it writes for each. On several processes no sample is counted twice, and numbers are reduced over the
    processes even where the module does not ask for it; so that this holds for the current weights, too, they are
    then evaluated once more, and logged as ``current/NAME``.

    After the run, ``callback.table`` holds the rows: ``{"row": …, NAME: number, …}``.

    Args:
        candidates: Checkpoints of complete models, by row.
        base: The checkpoint that the experts started from, where there are methods.
        experts: The checkpoints (run folders, adapters, task vectors) of the experts: a list, or a mapping from a name.
        methods: Merging methods, by row; the experts are merged in memory when the evaluation starts.
        stages: Where to compare; ``fit`` stands for the validations of a fit.
        output: Where to write the table as well: a ``.csv`` file, with all digits, a ``.md`` or a ``.tex`` file.
        **options: What :class:`lightning_merge.callbacks.merging_callback.MergingCallback` takes.
    """

    def __init__(
        self,
        candidates: dict[str, str] | None = None,
        base: str | None = None,
        experts: list[str] | dict[str, str] | None = None,
        methods: dict[str, MergeMethod] | None = None,
        stages: Sequence[Literal["fit", "validate", "test"]] = ("validate", "test"),
        output: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(base or "", experts or [], **options)
        self.paths = candidates or {}
        self.methods = methods or {}
        self.stages = stages
        self.output = output
        self.table: list[dict[str, Any]] = []
        self._rows: dict[str, dict[str, float]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before the first batch that all candidates fit the module."""
        if stage not in self.stages:
            return
        check_whole(trainer, type(self).__name__)
        self._check_arguments()
        if self.methods:
            self.check(trainer, pl_module, self.methods, with_run=False)
        processes = processes_of_run()
        with processes.together():
            if processes.is_first:
                current = open_weights(pl_module.state_dict(), "the model")
                raise_all(
                    [problem for row in self.paths for problem in problems_of(self._check, row, pl_module, current)]
                )
        self.begin(trainer, pl_module)

    def _check_arguments(self) -> None:
        rows = [*self.paths, *self.methods]
        if not rows:
            raise MergeError(
                "CompareMerged has nothing to compare; give it candidates, or a base, experts and methods."
            )
        taken = [row for row in dict.fromkeys(rows) if row in (CURRENT, "") or rows.count(row) > 1]
        if taken:
            raise MergeError(f"CompareMerged cannot call a row {taken[0]!r}, which is taken; give it another name.")
        if self.methods and not (self.base and self.experts):
            raise MergeError("CompareMerged has methods and lacks what to merge; give it a base and experts.")
        if self.output is not None and Path(self.output).suffix not in (".csv", ".md", ".tex"):
            raise MergeError(
                f"CompareMerged writes its table as .csv, .md or .tex, and not as {self.output}; rename it."
            )

    def _check(self, row: str, pl_module: LightningModule, current: Weights) -> None:
        check_fit(pl_module, {row: self._candidate(row, current).meta})

    def _candidate(self, row: str, current: Weights) -> Weights:
        return match_names(current, open_weights(self.paths[row], row))

    def evaluates(self, trainer: Trainer) -> bool:
        """Tell whether the trainer is in one of the chosen stages."""
        return trainer.state.fn is not None and trainer.state.fn.value in self.stages and not trainer.sanity_checking

    def candidates(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, Mapping[str, Tensor]]:
        """Return, by row, the weights ``(…)`` of the candidates, as the first process reads them, and of the merges."""
        processes = processes_of_run()
        current = open_weights(pl_module.state_dict(), "the model")
        candidates: dict[str, Mapping[str, Tensor]] = {CURRENT: current} if processes.count > 1 else {}
        candidates |= {row: self._from_first(row, current, processes) for row in self.paths}
        return candidates | {row: self.merge(trainer, pl_module, method)[0] for row, method in self.methods.items()}

    def _from_first(self, row: str, current: Weights, processes: Processes) -> dict[str, Tensor]:
        weights = None
        with processes.together():
            if processes.is_first:
                weights = dict(self._candidate(row, current))
        return processes.from_first(weights)

    def after(self, rows: dict[str, dict[str, float]]) -> None:
        """Keep the rows until the module has logged its own."""
        self._rows = rows

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the table, print it, and write it where a file was asked for."""
        if not self.evaluates(trainer):
            return
        rows, self._rows = self._rows, {}
        names = list(dict.fromkeys(name for values in rows.values() for name in values))
        if CURRENT not in rows:  # in one process the module's own numbers are exact
            logged = trainer.callback_metrics
            rows = {CURRENT: {name: float(logged[name]) for name in names if name in logged}} | rows
        self.table = [{"row": row, **values} for row, values in rows.items()]
        if not names:
            rank_zero_warn(f"CompareMerged has nothing to show, because {type(pl_module).__name__} has logged nothing.")
            return
        processes = processes_of_run()
        with processes.together():
            if processes.is_first:
                sys.stdout.write(f"\n{self.markdown()}\n")
                if self.output is not None:
                    texts = {".csv": self.csv(), ".md": f"{self.markdown()}\n", ".tex": f"{self.grid().latex()}\n"}
                    write_text(local_path(self.output), texts[Path(self.output).suffix])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the table of a test, print it, and write it where a file was asked for."""
        self.on_validation_end(trainer, pl_module)

    @property
    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for record in self.table for name in record if name != "row"))

    def grid(self) -> Grid:
        """Return the table as it is shown, with four digits."""

        def cell(value: float | None) -> Cell:
            return Cell("") if value is None else Cell(f"{value:.4g}", value)

        rows = [[Cell(record["row"]), *(cell(record.get(name)) for name in self._names)] for record in self.table]
        return Grid(["candidate", *self._names], rows)

    def markdown(self) -> str:
        """Return the table in Markdown, with four digits."""
        return self.grid().markdown()

    def csv(self) -> str:
        """Return the table as CSV, with all digits."""
        return self.grid().csv()
