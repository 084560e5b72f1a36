"""Choose a method's coefficient, or any of its fields, by the accuracy of the merged models on validation data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_merge.checkpoints import Source, open_experts, open_weights
from lightning_merge.data import DomainDataModule
from lightning_merge.evaluation.candidates import Record, evaluate_candidates
from lightning_merge.evaluation.held_out import OWN_EXPERT
from lightning_merge.evaluation.repeatable_trainer import RepeatableTrainer
from lightning_merge.evaluation.table import Table
from lightning_merge.merging.greedy_soup import greedy_soup
from lightning_merge.merging.merged import Merged
from lightning_merge.merging.sweeping import SearchGrid, Setting, list_settings, sweep, with_setting
from lightning_merge.methods import MergeMethod
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.processes import processes_of_run
from lightning_merge.utilities.progress import counted


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Args:
        method: The method with the best values of its fields.
        setting: These values, by field.
        merged: The experts merged with them.
        table: Every setting that was evaluated, a row each, on the validation splits.
        score: The mean normalized accuracy of the best setting; 1 is that of the experts.
    """

    method: MergeMethod
    setting: Setting
    merged: Merged
    table: Table
    score: float

    def summary(self) -> str:
        """Describe the choice in one line."""
        tried = len(self.table.row_names) - 1  # the own expert
        return f"{row_name(self.setting)}: the best of {tried} settings, normalized accuracy {100 * self.score:.1f} %"


def search_coefficients(
    trainer: RepeatableTrainer,
    model: LightningModule,
    datamodule: DomainDataModule,
    base: Source,
    experts: Mapping[str, Source],
    method: MergeMethod,
    grid: SearchGrid | None = None,
    patience: int | None = 3,
    at_once: int = 4,
    output: str | Path | None = None,
    **options: Any,
) -> Found:
    """Merge by every setting of a grid and choose the best on the validation splits of the experts' domains.

    The best has the highest normalized accuracy: that of the merged model divided by that of the domain's own expert,
    on the same images, averaged over the domains. Of equal ones the first is taken. No test split and no other domain
    is read. The outcome does not depend on the number of processes, nor on ``at_once``.

    Args:
        trainer: The trainer whose settings are used for the evaluations.
        model: A module that maps images to logits; its own weights are not used.
        datamodule: The data module that holds the experts' domains.
        base: The model that the experts started from.
        experts: The experts by the name of their domain.
        method: The method; fields that are not in the grid keep their value.
        grid: The values to try for every field, in their order, see :func:`lightning_merge.sweep`; by default the
            scaling coefficients 0.1, 0.2, …, 3 of TSV-M and Iso (Task Arithmetic's 0.1 to 1 are among them).
        patience: Try no larger coefficient (more exactly: none that comes later in the grid) once this many in a row
            have not raised the mean accuracy, as TSV-M and Iso do; each setting of the other fields starts anew.
            None tries all of them.
        at_once: Merged models that are in memory and evaluated at the same time, in one pass over the data.
        output: A folder for results.jsonl, table.md, table.tex and table.csv.
        options: What else :func:`lightning_merge.merge` takes, such as ``exclude``.

    Returns:
        The best setting, its weights, and the table of all that were tried.

    Raises:
        MergeError: If the grid does not fit the method, or an expert belongs to no domain that may be used.
    """
    check_search(method, grid, patience, at_once)
    validation = Validation(trainer, model, datamodule, base, experts)
    patiences: dict[str, Patience] = {}

    def stopping(setting: Setting) -> Patience:
        others = {name: value for name, value in setting.items() if name != "scale"}
        return patiences.setdefault(row_name(others), Patience(patience))

    best: tuple[float, Setting, Merged] | None = None
    records: list[Record] = []
    with counted("search", "settings", [1.0] * len(list_settings(method, grid))) as count:

        def skip(setting: Setting) -> bool:
            if over := stopping(setting).is_over:
                count.step()
            return over

        for batch in _batches(sweep(base, experts, method, grid, skip=skip, **options), at_once):
            measured = validation.evaluate({row_name(setting): merged.weights for setting, merged in batch})
            for setting, merged in batch:
                count.step()
                if stopping(setting).is_over:  # an earlier one of this batch was the last
                    continue
                row, chosen = row_name(setting), with_setting(method, setting).describe()
                of_row = [r | {"setting": setting, "method": chosen} for r in measured if r["row"] == row]
                records += of_row
                table = Table([*validation.own_records, *of_row])
                stopping(setting).count(_measured(table.mean(row)))
                score = _measured(table.normalized(row))
                if score > (-math.inf if best is None else best[0]):  # NaN is above nothing
                    best = score, setting, merged
    if best is None:
        raise MergeError(
            "No setting of the search has a number for an accuracy, and neither is the best; see whether the experts' "
            "validation data hold images, and whether their accuracies are numbers."
        )
    score, setting, merged = best
    table = Table([*validation.own_records, *records])
    with processes_of_run().together():
        if output is not None and trainer.is_global_zero:
            table.save(output)
    return Found(with_setting(method, setting), setting, merged, table, score)


def greedy_soup_on_validation(
    trainer: RepeatableTrainer,
    model: LightningModule,
    datamodule: DomainDataModule,
    base: Source,
    experts: Mapping[str, Source],
    **options: Any,
) -> Merged:
    """Cook the greedy soup of the experts by their mean normalized accuracy on the domains' validation splits.

    Args:
        trainer: The trainer whose settings are used for the evaluations.
        model: A module that maps images to logits; its own weights are not used.
        datamodule: The data module that holds the experts' domains.
        base: The model that the experts started from.
        experts: The experts by the name of their domain.
        options: What else :func:`lightning_merge.merge` takes, such as ``exclude``.

    Returns:
        The soup, see :func:`lightning_merge.merging.greedy_soup.greedy_soup`.
    """
    validation = Validation(trainer, model, datamodule, base, experts)
    return greedy_soup(base, experts, validation.score, **options)


def check_search(method: MergeMethod, grid: SearchGrid | None, patience: int | None = None, at_once: int = 1) -> None:
    """Raise a :class:`MergeError` unless the grid fits the method and the numbers are positive."""
    list_settings(method, grid)
    for name, value in (("patience", patience), ("at_once", at_once)):
        if value is not None and value < 1:
            raise MergeError(f"{name} must be at least 1, got {value}.")


def row_name(setting: Setting) -> str:
    """Build the name of a setting's row, such as ``common_fraction 0.8, scale 1.3``."""
    return ", ".join(f"{name} {value}" for name, value in setting.items())


@dataclass
class Patience:
    """Counter of the values in a row that are not above the best one before.

    Args:
        limit: The count at which to stop; None for never.
    """

    limit: int | None
    best: float = field(default=-1.0, init=False)
    waited: int = field(default=0, init=False)

    @property
    def is_over(self) -> bool:
        """Whether to stop."""
        return self.limit is not None and self.waited >= self.limit

    def count(self, value: float) -> None:
        """Count one value."""
        self.waited = 0 if value > self.best else self.waited + 1
        self.best = max(self.best, value)


class Validation:
    """The validation splits of the experts' own domains, and how good each expert is on its own.

    Args:
        trainer: The trainer whose settings are used for the evaluations.
        model: A module that maps images to logits; its own weights are not used.
        datamodule: The data module that holds the experts' domains.
        base: The model that the experts started from.
        experts: The experts by the name of their domain.

    Raises:
        MergeError: If there is no such domain, or if it is held out.
    """

    def __init__(
        self,
        trainer: RepeatableTrainer,
        model: LightningModule,
        datamodule: DomainDataModule,
        base: Source,
        experts: Mapping[str, Source],
    ) -> None:
        _check_domains(datamodule, experts)
        self._trainer, self._model, self._datamodule = trainer, model, datamodule
        self.domains = list(experts)
        self._experts = open_experts(experts, open_weights(base, name="base"))

    @cached_property
    def own_records(self) -> list[Record]:
        """The records of each expert on its own domain, by which the others are divided."""
        records = []
        for domain, expert in self._experts.items():
            records += self.evaluate({OWN_EXPERT: expert}, [domain])
            if records[-1]["accuracy"] == 0:
                raise MergeError(
                    f"The expert {domain} classifies no image of its own validation split right, so that nothing can "
                    "be normalized by it; is it the expert of this domain?"
                )
        return records

    def evaluate(
        self, candidates: Mapping[str, Mapping[str, Tensor]], domains: Sequence[str] | None = None
    ) -> list[Record]:
        """Evaluate candidates, weights ``(…)`` by name, on the validation splits in one pass over the data.

        Returns:
            A record for each candidate on each domain.
        """
        data = self._datamodule.only(train=[], test=domains or self.domains, test_on="val")
        records = evaluate_candidates(self._trainer.again(), self._model, data, candidates)
        return [record | {"test_on": "val"} for record in records]

    def score(self, weights: Mapping[str, Tensor]) -> float:
        """Compute the mean normalized accuracy of one candidate, weights ``(…)`` by name."""
        table = Table([*self.own_records, *self.evaluate({"candidate": weights})])
        return _measured(table.normalized("candidate"))


def _measured(value: float | None) -> float:
    """Return a number of a row that was measured on every domain, as all rows of a search are."""
    assert value is not None
    return value


def _check_domains(datamodule: DomainDataModule, experts: Mapping[str, Source]) -> None:
    if not isinstance(experts, Mapping) or not experts:
        raise MergeError("A search needs the experts by the name of their domain, on whose validation data it looks.")
    for domain in experts:
        if domain not in datamodule.domains:
            raise MergeError(
                f"The expert {domain!r} has no domain to validate on; name experts by their domain: "
                f"{', '.join(datamodule.domains)}."
            )
        if domain == datamodule.held_out:
            raise MergeError(f"The domain {domain!r} is held out, so its expert cannot be merged; take it out of one.")


def _batches(settings: Iterator[tuple[Setting, Merged]], size: int) -> Iterator[list[tuple[Setting, Merged]]]:
    """Yield ``size`` settings at a time."""
    while batch := list(islice(settings, size)):
        yield batch
