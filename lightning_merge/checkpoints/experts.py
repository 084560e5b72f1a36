"""Open experts: checkpoints, run folders, adapters, task vectors, state dicts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_merge.checkpoints.adapters import is_adapter, open_adapter
from lightning_merge.checkpoints.reading import Source, open_weights
from lightning_merge.checkpoints.task_vector_files import is_task_vector, open_task_vector
from lightning_merge.checkpoints.views import as_named, match_names, own_names
from lightning_merge.checkpoints.weights import Weights
from lightning_merge.utilities.errors import MergeError, raise_all


def open_expert(source: Source, base: Weights, name: str | None = None, *, read: bool = True) -> Weights:
    """Open an expert: dense weights, or an adapter or a task vector over the base.

    Args:
        source: Weights, see :func:`lightning_merge.checkpoints.open_weights`, the folder of an adapter, or a task
            vector's file.
        base: The model that an adapter or a task vector is put on; such an expert is seen under the same names.
        name: What to call this expert in messages; by default the path.
        read: Whether to read the base, to check that a task vector is the difference to these very weights.

    Raises:
        MergeError: If it cannot be opened, or if it does not fit the base.
    """
    if is_task_vector(source):
        return as_named(open_task_vector(source, own_names(base), name=name, read=read), base)
    if is_adapter(source):
        return as_named(open_adapter(source, own_names(base), name=name), base)
    return open_weights(source, name)


Experts = Sequence[Source] | Mapping[str, Source]
"""The experts: a sequence of sources, or a mapping from the expert's name to its source."""


def open_experts(experts: Experts, base: Weights) -> dict[str, Weights]:
    """Open every expert for reading, under its name, its path, or (a state dict in a list) its position.

    Adapters, as peft writes them, and task vectors are opened over the base. Experts whose names differ from the base's
    by a prefix are seen under the base's names, see :mod:`lightning_merge.checkpoints.prefixes`.

    Raises:
        MergeError: If experts cannot be opened, or if there are none; every problem is listed.
    """
    named, problems = open_each(experts, base)
    raise_all(problems)
    return named


def open_each(experts: Experts, base: Weights, *, read: bool = True) -> tuple[dict[str, Weights], list[str]]:
    """Open the experts that can be opened, and list what is wrong with the others, see :func:`open_experts`."""
    named: dict[str, Weights] = {}
    problems: list[str] = []
    unnamed = not isinstance(experts, Mapping)
    pairs: Iterable[tuple[Any, Source]] = experts.items() if isinstance(experts, Mapping) else enumerate(experts)
    for key, source in pairs:
        is_path = isinstance(source, (str, os.PathLike, Weights))
        try:
            weights = open_expert(source, base, None if unnamed and is_path else str(key), read=read)
        except MergeError as error:
            problems += error.problems
            continue
        name = weights.name if unnamed else key
        if name in named:
            problems.append(f"The expert {name} is given twice.")
        named[name] = match_names(base, weights)
    if not experts:
        problems.append("There are no experts to merge; give at least one.")
    return named, problems
