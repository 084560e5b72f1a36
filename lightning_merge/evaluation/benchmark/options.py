"""The options of the benchmarks, and what may be wrong with them, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import Any, Literal

from lightning.pytorch import LightningModule

from lightning_merge.checkpoints.names import matches
from lightning_merge.data import DomainDataModule
from lightning_merge.merging.repairing import Repair
from lightning_merge.methods import MergeMethod


@dataclass(frozen=True)
class Pretrain:
    """Settings of the fit of the experts' common start, where there is no pretrained model.

    Args:
        domains: The domains to fit it on; they are not among those that are left out.
        max_epochs: Number of epochs, if not that of an expert.
        hparams: Hyper-parameters of the model that differ from an expert's, such as ``learning_rate``.
    """

    domains: Sequence[str]
    max_epochs: int | None = None
    hparams: dict[str, Any] = field(default_factory=dict)

    def problems(self, held_out: Sequence[str], available: Sequence[str], model: LightningModule) -> list[str]:
        """List what is wrong with the values.

        Args:
            held_out: The domains that are left out in turn.
            available: All domains of the data.
            model: The model, with its hyper-parameters.
        """
        return [
            *unknown_domains(self.domains, available),
            *(
                f"The base would be fitted on {domain!r}, which is held out later; take it out of one."
                for domain in self.domains
                if domain in held_out
            ),
            *(
                f"The model has no hyper-parameter {key!r} to change for the base; it has {', '.join(model.hparams)}."
                for key in self.hparams
                if key not in model.hparams
            ),
        ]


@dataclass(frozen=True)
class Arm:
    """A way from experts of several foundations to a model.

    Args:
        align: The values by which the foundations' channels are matched; ``nothing``: they stay where they are.
        repair: The repair after the merge; null: none.
    """

    align: Literal["weights", "activations", "nothing"] = "weights"
    repair: Repair | None = None


@dataclass(frozen=True)
class Foundations:
    """Settings of the fits of foundations, and of what is done with their experts.

    Args:
        domains: The tasks that the foundations are fitted on; no expert is of them.
        arms: The ways to be compared, by the name of their rows.
        merged: Numbers of experts that are merged, those of the first domains: 2, 3, ….
        count: Number of foundations; the experts are fitted from them in turn.
        seeds: The seeds; the benchmark is run once for each, and the numbers are means over them.
        max_epochs: Number of epochs of a foundation, if not that of an expert.
        hparams: Hyper-parameters of a foundation's model that differ from an expert's.
        private: Shell patterns of the parameters that every expert keeps to itself.
        batches: Maximum number of batches of each task's training images that alignment and repair read.
        batch_size: Number of images in such a batch.
        restarts: Number of searches of weight matching, of which the best one counts.
    """

    domains: Sequence[str]
    arms: dict[str, Arm]
    merged: Sequence[int] = (2,)
    count: int = 2
    seeds: Sequence[int] = (0,)
    max_epochs: int | None = None
    hparams: dict[str, Any] = field(default_factory=dict)
    private: Sequence[str] = ("head.*",)
    batches: int = 8
    batch_size: int = 64
    restarts: int = 2


def unknown_domains(domains: Sequence[str], available: Sequence[str]) -> list[str]:
    """List the domains that the data do not have."""
    return [
        f"There is no domain {domain!r}; the domains are {', '.join(available)}."
        for domain in domains
        if domain not in available
    ]


def task_problems(options: Foundations, tasks: Sequence[str], datamodule: DomainDataModule) -> list[str]:
    """List what is wrong with the tasks of the experts and of the foundations, and with the data of both."""
    problems = [
        f"There is no task {name!r}; the tasks are {', '.join(datamodule.domains)}."
        for name in [*tasks, *options.domains]
        if name not in datamodule.domains
    ]
    problems += [
        f"The foundations would be fitted on {name!r}, which an expert is of; take it out of one."
        for name in options.domains
        if name in tasks
    ]
    problems += _repeated("domains", tasks)
    if not options.domains:
        problems.append("Say what the foundations are fitted on: foundations.domains.")
    if datamodule.test_on == "all":
        problems.append("Experts are tested on their own tasks, which they were trained on; use test_on=test.")
    return problems


def method_problems(options: Foundations, methods: Mapping[str, MergeMethod]) -> list[str]:
    """List what is wrong with the methods, and why the repairs of the arms do not fit them."""
    problems = [] if methods else ["There are no methods to compare; give at least one."]
    repairs = [arm.repair for arm in options.arms.values() if arm.repair]
    for name, method in methods.items():
        if method.needs or method.needs_data:
            problems.append(f"The method {name!r} needs statistics or images while it merges; leave it out here.")
        problems += dict.fromkeys(problem for repair in repairs for problem in repair.problems_with(method))
    return problems


def arm_problems(options: Foundations, names: Iterable[str]) -> list[str]:
    """List what is wrong with the arms for a model whose weights have these names."""
    problems = [] if options.arms else ["There is no way to merge to compare; give foundations.arms."]
    has_batch_norm = any("running_var" in name for name in names)
    for row, arm in options.arms.items():
        if arm.repair is None:
            continue
        problems += [f"The way {row!r}: {problem}" for problem in arm.repair.problems()]
        if arm.repair.by == "batch_norm" and not has_batch_norm:
            problems.append(f"The way {row!r}: the model has no BatchNorm with running statistics to re-estimate.")
    return problems


def number_problems(options: Foundations, tasks: Sequence[str]) -> list[str]:
    """List the numbers that are out of their range."""
    problems = _repeated("foundations.seeds", options.seeds)
    if options.batches < 1 or options.batch_size < 2:
        problems.append("foundations.batches must be at least 1, and foundations.batch_size at least 2.")
    if not 1 <= options.count <= len(ascii_lowercase):
        problems.append(f"There can be 1 to {len(ascii_lowercase)} foundations, not {options.count}.")
    if not options.merged or min(options.merged) < 1 or max(options.merged) > len(tasks):
        problems.append(
            f"foundations.merged says how many of the {len(tasks)} tasks are merged; got {list(options.merged)}."
        )
    if not options.seeds:
        problems.append("Give at least one seed: foundations.seeds.")
    return problems


def private_problems(options: Foundations, names: Sequence[str]) -> list[str]:
    """Report it if no weight of a model, by their names, is kept private by an expert."""
    if any(matches(name, options.private) for name in names):
        return []
    return [
        f"No parameter of the model matches foundations.private ({', '.join(options.private)}); it has "
        f"{', '.join(names[-3:])}."
    ]


def _repeated(option: str, values: Sequence[Any]) -> list[str]:
    """Report it if an option holds a value twice."""
    if len(set(values)) == len(values):
        return []
    return [f"{option} holds a value twice: {', '.join(map(str, values))}."]
