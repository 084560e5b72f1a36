"""Evaluate many sets of weights of one module in a single pass over the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_merge.checkpoints import open_weights
from lightning_merge.data import DomainDataModule
from lightning_merge.evaluation.beside.beside import apart_from, load, tensors_of
from lightning_merge.models.metrics import classification_metrics
from lightning_merge.utilities.errors import raise_all
from lightning_merge.utilities.modules import fit_problems

Record = dict[str, Any]
"""One measurement: ``row``, ``domain``, and a value in [0, 1] for every metric."""


def evaluate_candidates(
    trainer: Trainer,
    module: LightningModule,
    datamodule: DomainDataModule,
    candidates: Mapping[str, Mapping[str, Tensor]],
    ensembles: Mapping[str, Sequence[str]] | None = None,
) -> list[Record]:
    """Run every candidate on every test loader, reading the data once.

    Args:
        trainer: The trainer of the pass, on as many processes as it has; the numbers do not depend on how many.
        module: A module that maps images ``(N, …)`` to logits ``(N, C)``; its own weights are not used.
        datamodule: The data. Its test loaders yield images ``(N, …)`` and labels ``(N,)``, one loader for each of its
            ``test_domains``.
        candidates: Complete weights of the module, with its shapes ``(…)``, by the candidate's name.
        ensembles: Further rows: candidates whose logits are averaged.

    Returns:
        A record for every candidate and ensemble on every domain.

    Raises:
        MergeError: If a candidate does not have the module's parameters.
    """
    check_fit(module, candidates)
    check_classes(module, datamodule.class_names)
    domains = list(datamodule.test_domains)
    evaluator = CandidateEvaluator(module, candidates, ensembles or {}, domains, len(datamodule.class_names))
    logged: dict[str, float] = {}
    own = {name: tensor.detach().clone() for name, tensor in tensors_of(module).items()}
    try:
        for results in trainer.test(evaluator, datamodule=datamodule, verbose=False):
            logged |= results
    finally:
        load(module, own)
    return [
        {"row": row, "domain": domain}
        | {name: logged[evaluator.key(row, domain, name)] for name in evaluator.metric_names}
        for row in evaluator.rows
        for domain in domains
    ]


def check_fit(module: LightningModule, candidates: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise a :class:`lightning_merge.MergeError` unless each candidate has exactly the module's parameters ``(…)``."""
    expected = open_weights(module.state_dict(), "the model").meta
    raise_all(
        [
            problem
            for name, weights in candidates.items()
            for problem in fit_problems(expected, weights, f"the candidate {name!r}", "exactly")
        ]
    )


def check_classes(module: LightningModule, names: Sequence[str]) -> None:
    """Raise a :class:`lightning_merge.MergeError` if the module knows its classes and these are others."""
    check = getattr(module, "check_classes", None)
    if check is not None:
        check(names)


class CandidateEvaluator(LightningModule):
    """Evaluator that puts each candidate's weights into one module in turn, batch by batch, and keeps its metrics.

    Args:
        module: A module that maps images ``(N, …)`` to logits ``(N, C)``.
        candidates: Complete weights of the module, with its shapes ``(…)``, by the candidate's name.
        ensembles: Rows whose logits are the mean of some candidates' logits.
        domains: Names of the test loaders.
        num_classes: Number of classes.
    """

    def __init__(
        self,
        module: LightningModule,
        candidates: Mapping[str, Mapping[str, Tensor]],
        ensembles: Mapping[str, Sequence[str]],
        domains: Sequence[str],
        num_classes: int,
    ) -> None:
        super().__init__()
        self.module = module
        self.rows = [*candidates, *ensembles]
        self.metric_names = [str(name) for name in classification_metrics(num_classes)]
        self._domains = list(domains)
        self._candidates = apart_from(module, candidates)
        self._ensembles = ensembles
        metrics = nn.ModuleList(classification_metrics(num_classes) for _ in self.rows for _ in domains)
        self._metrics = cast("Sequence[MetricCollection]", metrics)

    @property
    def preprocessing(self) -> Any:
        """The preprocessing of the module's backbone, which the data module asks for."""
        return getattr(self.module, "preprocessing", None)

    def key(self, row: str, domain: str, metric: str) -> str:
        """Build the name under which a number is logged: by position, because names of rows are free text."""
        return f"{self.rows.index(row)}/{self._domains.index(domain)}/{metric}"

    def on_test_start(self) -> None:
        """Move the candidates to the device, and find the tensors that their weights are written into."""
        self._tensors = {name: tensor.detach() for name, tensor in tensors_of(self.module).items()}
        self._candidates = {
            row: {name: weights[name].to(self.device) for name in self._tensors}
            for row, weights in self._candidates.items()
        }

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count one batch, images ``(N, …)`` and labels ``(N,)``, for every candidate and ensemble."""
        images, labels = batch
        logits = {}
        for name, weights in self._candidates.items():
            for place, tensor in self._tensors.items():
                tensor.copy_(weights[place])  # in place, so that compiled functions and closures see them
            logits[name] = self.module(images).float()
        for name, members in self._ensembles.items():
            logits[name] = torch.stack([logits[member] for member in members]).mean(dim=0)
        for i, name in enumerate(self.rows):
            probabilities = logits[name].softmax(dim=-1)
            self._metrics[i * len(self._domains) + dataloader_idx].update(probabilities, labels)

    def on_test_epoch_end(self) -> None:
        """Log every metric of every candidate and ensemble on every domain."""
        for i, metrics in enumerate(self._metrics):
            row, domain = divmod(i, len(self._domains))
            self.log_dict({f"{row}/{domain}/{name}": value for name, value in metrics.compute().items()})
