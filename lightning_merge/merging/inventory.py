"""Which parameters a set of models shares, what happens to each, and what does not fit: from headers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from lightning_merge.checkpoints import Weights
from lightning_merge.checkpoints.joined import find_inseparable, find_magnitudes
from lightning_merge.checkpoints.names import (
    is_left_out,
    is_of_one_kind,
    is_running_statistic,
    unused_patterns,
)
from lightning_merge.utilities.errors import raise_all


@dataclass(frozen=True)
class Inventory:
    """Inventory of the base's parameters: what happens to each.

    Args:
        merged: Merged by the method as task vectors.
        averaged: BatchNorm's running statistics: the mean over the experts. (Adding up differences of variances can
            make a variance negative.)
        copied: Taken from the base: integer buffers, and whatever the user excluded.
        tied: Names that share a tensor with another name: ``{alias: name}``. They stay tied.
        private: Excluded parameters of each expert, by the expert's name.
        magnitudes: Magnitudes of normalised weights, which follow from the merged ones, and the merged parameters that
            stand for these weights, see :mod:`lightning_merge.checkpoints.joined`.
    """

    merged: tuple[str, ...]
    averaged: tuple[str, ...]
    copied: tuple[str, ...]
    tied: dict[str, str]
    private: dict[str, tuple[str, ...]]
    magnitudes: dict[str, str] = field(default_factory=dict)

    @property
    def stored(self) -> tuple[str, ...]:
        """The names of the tensors that the merged model consists of, each tensor once."""
        return (*self.merged, *self.averaged, *self.copied, *self.magnitudes)


def take_inventory(
    base: Weights, experts: Sequence[Weights], include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> Inventory:
    """Compare the models by names, shapes and dtypes, without reading a tensor.

    Args:
        base: The model that the experts were fine-tuned from.
        experts: The experts.
        include: Merge only the parameters that match one of these patterns.
        exclude: Do not merge the parameters that match one of these patterns.

    Returns:
        What happens to every parameter.

    Raises:
        MergeError: If the models do not fit together; every conflict is listed.
    """
    inventory, problems = compare(base, experts, include, exclude)
    raise_all(problems)
    return inventory


def compare(
    base: Weights, experts: Sequence[Weights], include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> tuple[Inventory, list[str]]:
    """Take the inventory as far as it goes, and list every conflict, see :func:`take_inventory`."""
    left_out = partial(is_left_out, include=include, exclude=exclude)

    tied = {
        alias: owner
        for alias, owner in base.tied.items()
        if left_out(alias) == left_out(owner) and all(_shares(expert, alias, owner) for expert in experts)
    }
    names = [name for name in base if name not in tied]
    compared = [name for name in base if not left_out(name)]
    of_base = find_inseparable(base, "The base", left_out)
    of_experts = [find_inseparable(expert, f"The expert {expert.name}", left_out) for expert in experts]
    whole = [expert for expert, found in zip(experts, of_experts, strict=True) if not (found or of_base)]
    alike = [expert for expert in whole if is_of_one_kind(compared, expert)]
    magnitudes = {g: v for g, v in find_magnitudes(base).items() if not (g in tied or left_out(g) or left_out(v))}
    merged, averaged, copied = [], [], []
    for name in names:
        if name in magnitudes:
            continue
        if left_out(name) or not base.meta[name].is_floating_point():
            copied.append(name)
        elif is_running_statistic(name):
            averaged.append(name)
        else:
            merged.append(name)
    problems = [
        *of_base,
        *(problem for found in of_experts for problem in found),
        *_halves(base, left_out),
        *_of_another_kind(compared, [expert for expert in whole if not is_of_one_kind(compared, expert)]),
        *unused_patterns(base, experts, [*(include or ()), *exclude]),
        *_missing(base, alike, left_out, tied),
        *_extra(base, alike, left_out),
        *_different(base, alike, [name for name in names if not left_out(name)]),
    ]
    if not merged:
        problems.append("Nothing is left to merge: every parameter is excluded.")
    private = {expert.name: tuple(name for name in expert if left_out(name)) for expert in experts}
    return Inventory(tuple(merged), tuple(averaged), tuple(copied), tied, private, magnitudes), problems


def _of_another_kind(names: Sequence[str], experts: Sequence[Weights]) -> list[str]:
    """Write one sentence for an expert that has hardly a name in common with the base, not one for each name."""
    return [
        f"The expert {expert.name} is no fine-tuned form of the base: of the base's {len(names)} parameters it has "
        f"{sum(name in expert for name in names)}. Names look like {names[0]!r} in the base and {next(iter(expert))!r} "
        "in the expert; if only what stands before them differs, give the base as a checkpoint of the same module."
        for expert in experts
    ]


def _halves(base: Weights, left_out: Callable[[str], bool]) -> list[str]:
    return [
        f"{g!r} and {v!r} are one weight together, of which a pattern leaves out one; leave out both, or none."
        for g, v in find_magnitudes(base).items()
        if left_out(g) != left_out(v)
    ]


def _shares(expert: Weights, alias: str, owner: str) -> bool:
    """Tell whether two names that the base ties are one in the expert, too (a file may leave the second name out)."""
    return alias not in expert or expert.tied.get(alias, alias) == expert.tied.get(owner, owner)


def _missing(
    base: Weights, experts: Sequence[Weights], left_out: Callable[[str], bool], tied: Mapping[str, str]
) -> list[str]:
    return [
        f"The expert {expert.name} lacks {name!r}, which the base has; give the expert's complete weights, "
        f"or leave the parameter out with exclude: [{_pattern(name)}]."
        for expert in experts
        for name in base
        if name not in expert and not left_out(name) and name not in tied
    ]


def _extra(base: Weights, experts: Sequence[Weights], left_out: Callable[[str], bool]) -> list[str]:
    return [
        f"The expert {expert.name} has {name!r}, which the base lacks, so that there is no difference to take; "
        f"if it belongs to this expert alone (a head), leave it out with exclude: [{_pattern(name)}], "
        "else give the base that the expert started from."
        for expert in experts
        for name in expert
        if name not in base and not left_out(name) and not _has_twin(expert, name, base)
    ]


def _has_twin(expert: Weights, name: str, base: Weights) -> bool:
    """Tell whether an expert's name is a second one of a tensor that the base has (whose file may leave it out)."""
    return any(twin in base and expert.tied.get(twin, twin) == expert.tied.get(name, name) for twin in expert)


def _different(base: Weights, experts: Sequence[Weights], names: Sequence[str]) -> list[str]:
    problems = []
    for expert in experts:
        for name in names:
            if name not in expert:
                continue
            old, new = base.meta[name], expert.meta[name]
            if old.shape != new.shape:
                problems.append(
                    f"{name!r} has shape {tuple(new.shape)} in the expert {expert.name} and {tuple(old.shape)} in "
                    f"the base; leave it out with exclude: [{_pattern(name)}], or give experts of one architecture."
                )
            elif old.is_complex() or new.is_complex():
                problems.append(f"{name!r} is complex, which no method merges; leave it out with exclude: [{name}].")
            elif old.is_floating_point() != new.is_floating_point():
                problems.append(
                    f"{name!r} is {new.dtype} in the expert {expert.name} and {old.dtype} in the base; quantized "
                    f"weights cannot be merged: give floating-point weights, or exclude: [{_pattern(name)}]."
                )
    return problems


def _pattern(name: str) -> str:
    """Make the pattern that leaves out the module of a parameter: ``head.weight -> head.*``."""
    module, dot, _ = name.rpartition(".")
    return f"{module}.*" if dot else name
