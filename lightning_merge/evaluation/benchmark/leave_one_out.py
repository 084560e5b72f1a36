"""Leave one domain out: fit an expert for each domain, merge the others', evaluate, for every domain in turn.

Every job leaves a ``done`` marker in its folder, so that a benchmark that was interrupted goes on where it stopped::

    output/settings.json            what the results depend on
    output/base/                    the common start, if it is fitted first
    output/experts/DOMAIN/          one expert each: expert.ckpt, logs
    output/experts/DOMAIN/expert.statistics.safetensors   of their data, where a method needs them
    output/comparison.json          what the experts have in common
    output/held_out/DOMAIN/done     what was measured on that domain, and how far each method moved each layer
    output/results.jsonl, table.md, table.tex, table.csv, report.html
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule

from lightning_merge.analysis import compare_experts
from lightning_merge.analysis.compare_experts import update_ratios
from lightning_merge.analysis.comparison_files import COMPARISON, save_comparison
from lightning_merge.checkpoints import Weights, noted_of, open_weights, statistics_file
from lightning_merge.data import DomainDataModule
from lightning_merge.evaluation.benchmark.options import Pretrain, unknown_domains
from lightning_merge.evaluation.benchmark.records import HeldOut
from lightning_merge.evaluation.candidates import Record
from lightning_merge.evaluation.engines import Engine, Sequential
from lightning_merge.evaluation.held_out import BASE, check_names, evaluate_domain
from lightning_merge.evaluation.jobs import (
    Job,
    JobList,
    claimed,
    fit_expert,
    is_done,
    mark_done,
    names_of,
    read_done,
    settings_of,
)
from lightning_merge.evaluation.merge_data import module_and_data
from lightning_merge.evaluation.repeatable_trainer import RepeatableTrainer
from lightning_merge.evaluation.search import check_search, search_coefficients
from lightning_merge.evaluation.statistics.collect import Kind, Recipe
from lightning_merge.evaluation.statistics.record import record_statistics
from lightning_merge.evaluation.table import Table
from lightning_merge.merging.merge import merge
from lightning_merge.merging.sweeping import SearchGrid
from lightning_merge.methods import MergeMethod
from lightning_merge.models.rebuilding import rebuild
from lightning_merge.utilities.errors import problems_of, raise_all
from lightning_merge.utilities.processes import processes_of_run


@dataclass
class Benchmark(JobList):
    """The jobs of one benchmark, see :meth:`lightning_merge.trainer.MergeTrainer.benchmark` for its arguments."""

    trainer: RepeatableTrainer
    model: LightningModule
    datamodule: DomainDataModule
    methods: Mapping[str, MergeMethod]
    output: Path
    domains: Sequence[str]
    pretrain: Pretrain | None = None
    statistics: Recipe | None = None
    search: Mapping[str, SearchGrid] = field(default_factory=dict)
    engine: Engine = field(default_factory=Sequential)

    def run(self) -> Table:
        """Do every job that is not done, and write the results."""
        self._check()
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        with claimed(self.trainer, self.output, self._settings(seed)):
            self.engine.run(self, seed)
            return self.write_results()

    def jobs(self) -> list[Job]:
        """List the jobs: the base, the experts, their comparison, their statistics, and every domain held out."""
        base = [Job("base", self.fit_base, self._is_done("base"))] if self.pretrain else []
        experts = [
            Job(f"expert {d}", partial(self.fit_expert, d), self._is_done("experts", d), names_of(base))
            for d in self.domains
        ]
        statistics = [
            Job(f"statistics {d}", partial(self.collect, d), partial(self._is_collected, d), [f"expert {d}"])
            for d in (self.domains if self._needed() else ())  # of all domains, or of none
        ]
        held_out = [
            Job(
                f"held out {d}", partial(self.hold_out, d), partial(self._is_held_out, d), names_of(experts, statistics)
            )
            for d in self.domains
        ]
        compared = Job("comparison", self.compare, (self.output / COMPARISON).exists, names_of(experts))
        return [*base, *experts, compared, *statistics, *held_out]

    # The jobs

    def fit_base(self) -> None:
        """Fit the common start of all experts."""
        assert self.pretrain is not None
        epochs = {"max_epochs": self.pretrain.max_epochs} if self.pretrain.max_epochs else {}
        self._fit(self.pretrain.domains, self.output / "base", self.pretrain.hparams, **epochs)

    def fit_expert(self, domain: str) -> None:
        """Fit the expert of a domain, from the base."""
        self._fit([domain], self._expert_folder(domain), {})

    def _fit(self, domains: Sequence[str], folder: Path, hparams: Mapping[str, Any], **arguments: Any) -> None:
        """Fit the base, or an expert from it, with hyper-parameters and arguments of the trainer that differ."""
        model = copy.deepcopy(self.model) if not hparams else rebuild(self.model, hparams)
        if self.pretrain and folder != self.output / "base":
            model.load_state_dict(dict(self._base()))
        fit_expert(self.trainer, model, self.datamodule, domains, folder, **arguments)

    def compare(self) -> None:
        """Compare the experts with each other, for the report."""
        with processes_of_run().together():
            if self.trainer.is_global_zero:
                experts = {name: self._expert(name) for name in self.domains}
                save_comparison(compare_experts(self._base(), experts), self.output)

    def collect(self, domain: str) -> None:
        """Collect the statistics of a domain's expert that the methods need, and write them to a file at the end."""
        expert = self._expert(domain)
        recipe = replace(self.statistics or Recipe(), kinds=self._needed())
        data = self.datamodule.only(train=[domain], test=[domain])
        record_statistics(self.trainer, self.model, data, expert, recipe, _statistics_path(expert))

    def hold_out(self, domain: str) -> None:
        """Merge the experts of all other domains by every method and evaluate on this domain."""
        done, missing = self._records(domain), self._missing(domain)
        base = self._base()
        experts = {name: self._expert(name) for name in self.domains}
        others = {name: weights for name, weights in experts.items() if name != domain}
        candidates, seconds, chosen = ({} if done else {BASE: base}), {}, {}
        for name, method in missing.items():
            started = time.perf_counter()
            arguments = module_and_data(self.trainer, self.model, self.datamodule, method, others)
            arguments["allow_strangers"] = True  # they were fitted from this base
            if name in self.search:
                best = search_coefficients(
                    self.trainer, self.model, self.datamodule, base, others, method, self.search[name], **arguments
                )
                candidates[name], chosen[name] = best.merged.weights, best.setting
            else:
                candidates[name] = merge(base, others, method, **arguments).weights
            seconds[name] = time.perf_counter() - started
        measured = evaluate_domain(
            self.trainer, self.model, self.datamodule, domain, candidates, experts={} if done else experts
        )
        for record in measured:
            row = record["row"]
            record["method"] = missing[row].describe() if row in missing else None
            record["merge_seconds"] = seconds.get(row)
            if row in chosen:
                record |= {"grid": self.search[row], "chosen": chosen[row]}
        records = [record for record in done if record["row"] not in missing] + measured
        with processes_of_run().together():
            if self.trainer.is_global_zero:
                kept = {name: ratios for name, ratios in self._updates(domain).items() if name not in missing}
                updates = kept | update_ratios(base, others, {name: candidates[name] for name in missing})
                mark_done(self.output / "held_out" / domain, {"records": records, "updates": updates})

    # What is on disk

    def _expert_folder(self, domain: str) -> Path:
        return self.output / "experts" / domain

    def _needed(self) -> tuple[Kind, ...]:
        """List the kinds of statistics that the methods need."""
        kinds = dict.fromkeys(kind for method in self.methods.values() for kind in method.needs)
        return cast(tuple[Kind, ...], tuple(kinds))  # a recipe checks them

    def _is_done(self, *folders: str) -> Callable[[], bool]:
        return partial(is_done, self.output.joinpath(*folders))

    def _is_collected(self, domain: str) -> bool:
        path = _statistics_path(self._expert(domain))
        noted = noted_of(open_weights(path)) if path.exists() else None
        return noted is not None and set(self._needed()) <= set(noted.get("kinds", ()))

    def _is_held_out(self, domain: str) -> bool:
        return bool(self._records(domain)) and not self._missing(domain)

    def _missing(self, domain: str) -> dict[str, MergeMethod]:
        """Find the methods that were not measured on a domain."""
        measured = [(record["row"], record["method"], record.get("grid")) for record in self._records(domain)]
        return {
            name: method
            for name, method in self.methods.items()
            if (name, method.describe(), self.search.get(name)) not in measured
        }

    def _expert(self, domain: str) -> Weights:
        return open_weights(self._expert_folder(domain) / "expert.ckpt")

    def _base(self) -> Mapping[str, Any]:
        return open_weights(self.output / "base" / "expert.ckpt") if self.pretrain else self.model.state_dict()

    def _records(self, domain: str) -> list[Record]:
        return read_done(self.output / "held_out" / domain, HeldOut).get("records", [])

    def _updates(self, domain: str) -> dict[str, dict[str, float]]:
        return read_done(self.output / "held_out" / domain, HeldOut).get("updates", {})

    def write_results(self) -> Table:
        """Write ``results.jsonl`` and the tables from what was measured, and return the table."""
        records = [record for domain in self.domains for record in self._records(domain)]
        position = {name: i for i, name in enumerate(self.methods)}
        kept = [record for record in records if record["method"] is None or record["row"] in position]
        table = Table(sorted(kept, key=lambda record: position.get(record["row"], -1)))
        with processes_of_run().together():
            if self.trainer.is_global_zero:
                table.save(self.output)
        return table

    def updates(self) -> dict[str, dict[str, dict[str, float]]]:
        """Read how far every method moved every group of layers, for each domain that was left out."""
        by_domain = {domain: self._updates(domain) for domain in self.domains}
        return {d: {name: moved[name] for name in self.methods if name in moved} for d, moved in by_domain.items()}

    # Before anything runs

    def _check(self) -> None:
        """Raise one :class:`lightning_merge.MergeError` that lists everything that cannot work."""
        self.engine.check(self.trainer)
        used = [*self.domains, *(self.pretrain.domains if self.pretrain else [])]
        problems = [
            *_domain_problems(self.domains, self.datamodule.domains),
            *(self.pretrain.problems(self.domains, self.datamodule.domains, self.model) if self.pretrain else []),
            *_method_problems(self.methods, len(self.domains)),
            *_search_problems(self.search, self.methods),
        ]
        raise_all(problems)
        for domain in used:
            self.datamodule.split(domain, "test")
        self.datamodule.check(used)

    def _settings(self, seed: int) -> dict[str, Any]:
        """Collect what the results depend on."""
        return {
            **settings_of(self.trainer, self.model, self.datamodule),
            "pretrain": asdict(self.pretrain) if self.pretrain else None,
            "statistics": asdict(self.statistics) if self.statistics else None,
            "domains": list(self.domains),
            "seed": seed,
        }


def _statistics_path(expert: Weights) -> Path:
    """Return the file of an expert's statistics, next to its checkpoint."""
    path = statistics_file(expert)
    assert path is not None  # the experts of a benchmark are files
    return path


def _domain_problems(domains: Sequence[str], available: Sequence[str]) -> list[str]:
    """List what is wrong with the domains that are left out in turn."""
    problems = unknown_domains(domains, available)
    if len(domains) < 2:
        problems.append(f"Leaving a domain out needs at least two, and there is {', '.join(domains) or 'none'}.")
    return problems


def _method_problems(methods: Mapping[str, MergeMethod], domains: int) -> list[str]:
    """List what is wrong with the methods, of which each merges the experts of all domains but one."""
    problems = [] if methods else ["There are no methods to compare; give at least one."]
    problems += problems_of(check_names, methods)
    merged = domains - 1
    for name, method in methods.items():
        if merged >= 1 and not method.min_experts <= merged <= (method.max_experts or merged):
            problems.append(
                f"With {domains} domains {merged} experts are merged at a time, which is not for {name!r}: it merges "
                f"{method.min_experts} to {method.max_experts or 'any number'}; leave it out."
            )
        try:
            json.dumps(method.describe())
        except TypeError as error:
            problems.append(f"The arguments of the method {name!r} must be plain values: {error}.")
    return problems


def _search_problems(search: Mapping[str, SearchGrid], methods: Mapping[str, MergeMethod]) -> list[str]:
    """List what is wrong with the grids that methods are searched over."""
    unknown = [name for name in search if name not in methods]
    problems = [p for name in search if name in methods for p in problems_of(check_search, methods[name], search[name])]
    return problems + [
        f"There is no method {name!r} to search; the methods are {', '.join(methods)}." for name in unknown
    ]
