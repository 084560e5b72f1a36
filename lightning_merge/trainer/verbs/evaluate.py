"""The verb ``evaluate``."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_merge.checkpoints import open_expert, open_weights
from lightning_merge.data import DomainDataModule
from lightning_merge.evaluation import Table, evaluate_domain
from lightning_merge.evaluation.candidates import Record
from lightning_merge.evaluation.held_out import BASE, check_names
from lightning_merge.report.loggers import log_to_loggers
from lightning_merge.trainer.verbs.reporting import ReportingTrainer
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.processes import processes_of_run


class EvaluateVerb(ReportingTrainer):
    """The verb ``evaluate``."""

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
        rows: dict[str, Mapping[str, Tensor]] = {}
        rows[BASE] = open_weights(base) if base is not None else model.state_dict()
        origin = open_weights(rows[BASE], BASE)
        rows |= {name: open_expert(path, origin, name) for name, path in (candidates or {}).items()}
        by_domain = {domain: open_expert(path, origin, f"expert {domain}") for domain, path in (experts or {}).items()}
        self.table = self._evaluate(model, datamodule, rows, by_domain)
        with processes_of_run().together():
            if output is not None and self.is_global_zero:
                self.table.save(output)
            if self.is_global_zero:
                log_to_loggers(self.given_loggers, self.table, {})
        return self.table

    def _evaluate(
        self,
        model: LightningModule,
        datamodule: DomainDataModule,
        rows: Mapping[str, Mapping[str, Tensor]],
        experts: Mapping[str, Mapping[str, Tensor]],
    ) -> Table:
        """Evaluate the rows, and the domains' experts, on every test domain."""
        records: list[Record] = []
        for domain in datamodule.test_domains:
            records += evaluate_domain(self, model, datamodule, domain, rows, experts)
        return Table(records)
