"""Decide by a parameter's name: shell patterns, running statistics, what two models share."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from lightning_merge.checkpoints.weights import Weights

_RUNNING_STATISTICS = ("running_mean", "running_var")


def is_left_out(name: str, include: Sequence[str] | None, exclude: Sequence[str]) -> bool:
    """Tell whether the user's patterns leave a parameter out of the merge."""
    return matches(name, exclude) or (include is not None and not matches(name, include))


def is_of_one_kind(names: Sequence[str], expert: Weights) -> bool:
    """Tell whether an expert has half of the base's names or more; only then are single differences worth listing."""
    return 2 * sum(name in expert for name in names) >= len(names)


def unused_patterns(base: Weights, experts: Sequence[Weights], patterns: Sequence[str]) -> list[str]:
    """List the patterns that match no parameter, a sentence each."""
    names = {name for model in (base, *experts) for name in model}
    return [
        f"The pattern {pattern!r} matches no parameter; names look like {', '.join(list(base)[:3])}."
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]


def is_running_statistic(name: str) -> bool:
    """Tell whether a name is that of BatchNorm's running mean or variance."""
    return name.rpartition(".")[2] in _RUNNING_STATISTICS


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether a name matches one of the shell patterns (``*.norm.*``, ``head.*``)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
