"""Evaluation on one domain: the base, its own expert, the ensemble of the others, and every merged model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_merge.data import DomainDataModule
from lightning_merge.evaluation.candidates import Record, evaluate_candidates
from lightning_merge.evaluation.repeatable_trainer import RepeatableTrainer
from lightning_merge.utilities.errors import MergeError

BASE, OWN_EXPERT, ENSEMBLE = "base", "own expert", "logit ensemble"
_OTHER_EXPERT = "expert "


def is_method(row: str) -> bool:
    """Tell whether a row is a merged model, and not one of those that merged models are compared with."""
    return row not in (BASE, OWN_EXPERT, ENSEMBLE) and not row.startswith(_OTHER_EXPERT)


def check_names(rows: Iterable[str]) -> None:
    """Raise a :class:`MergeError` if a merged model has the name of a row that every table has."""
    for row in rows:
        if not is_method(row):
            raise MergeError(
                f"The row {row!r} is there anyway, for what merged models are compared with; rename yours."
            )


def evaluate_domain(
    trainer: RepeatableTrainer,
    model: LightningModule,
    datamodule: DomainDataModule,
    domain: str,
    candidates: Mapping[str, Mapping[str, Tensor]],
    experts: Mapping[str, Mapping[str, Tensor]],
) -> list[Record]:
    """Evaluate models on one domain, reading each of its splits once.

    Args:
        trainer: The trainer whose settings are used for the evaluation.
        model: A module that maps images to logits; its own weights are not used.
        datamodule: The data module that holds the domain. Where it tests on all of a domain, the domain's own expert,
            which has seen most of it, is tested on the test split only, in a pass of its own.
        domain: The domain to test on.
        candidates: Weights ``(…)``, by the name of their row.
        experts: Weights ``(…)``, by domain. Those of this domain are the row ``own expert``; the others are a
            row each and together the ``logit ensemble``.

    Returns:
        A record for each row.

    Raises:
        MergeError: If an expert is not named after a domain.
    """
    strangers = [name for name in experts if name not in datamodule.domains]
    if strangers:
        raise MergeError(
            f"The expert {strangers[0]!r} has the name of no domain, so that it cannot be told whether it has seen "
            f"{domain!r}; name experts after their domains: {', '.join(datamodule.domains)}."
        )
    others = {_OTHER_EXPERT + name: weights for name, weights in experts.items() if name != domain}
    passes = {datamodule.test_on: {**candidates, **others}}
    if domain in experts:
        own_split = "test" if datamodule.test_on == "all" else datamodule.test_on
        passes.setdefault(own_split, {})[OWN_EXPERT] = experts[domain]
    records = []
    for test_on, rows in passes.items():
        ensembles = {ENSEMBLE: list(others)} if others and test_on == datamodule.test_on else {}
        data = datamodule.only(train=[], test=[domain], test_on=test_on)
        measured = evaluate_candidates(trainer.again(), model, data, rows, ensembles)
        records += [record | {"test_on": test_on} for record in measured]
    return records
