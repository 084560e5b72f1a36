"""Merge by every setting of a grid, computing what the settings have in common once: ``sweep(base, experts, …)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

from lightning_merge.checkpoints import Experts, Source, open_experts, open_weights
from lightning_merge.merging.merge import merge
from lightning_merge.merging.merged import Merged
from lightning_merge.methods import MergeMethod
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.factorization_cache import Factorizations

SearchGrid = Mapping[str, Sequence[Any]]
"""The values to try, by the name of the method's field; ``method.density`` is a field of the method inside another."""

Setting = dict[str, Any]
"""One point of a grid: a value for each field, the scaling coefficient last."""

SCALES = tuple(i / 10 for i in range(1, 31))
"""The coefficients that TSV-M and Iso try: 0.1, 0.2, …, 3."""


def sweep(
    base: Source,
    experts: Experts,
    method: MergeMethod,
    grid: SearchGrid | None = None,
    *,
    skip: Callable[[Setting], bool] = lambda setting: False,
    **options: Any,
) -> Iterator[tuple[Setting, Merged]]:
    """Merge by every setting of a grid, one after another, when it is asked for.

    The update of a method does not depend on ``scale``, so that all coefficients share one merge; and settings of other
    fields share the factorizations of the same matrices. The results are those of :func:`lightning_merge.merge`, bit
    for bit.

    Args:
        base: The model that the experts started from.
        experts: The experts: a sequence of sources, or a mapping from a name to a source.
        method: The method; fields that are not in the grid keep their value.
        grid: The values to try for every field, in their order; by default the scaling coefficients 0.1, 0.2, …, 3.
            ``scale`` varies fastest.
        skip: Is asked for each setting just before its turn; where it says True, the setting is left out.
        options: What else :func:`lightning_merge.merge` takes, such as ``exclude``.

    Yields:
        The setting and what was merged by it.

    Raises:
        MergeError: If the grid does not fit the method, before anything is merged.
    """
    settings = list_settings(method, grid)
    return _merge_all(base, experts, method, settings, skip, options)


def _merge_all(
    base: Source,
    experts: Experts,
    method: MergeMethod,
    settings: Sequence[Setting],
    skip: Callable[[Setting], bool],
    options: Mapping[str, Any],
) -> Iterator[tuple[Setting, Merged]]:
    base = open_weights(base, "base")
    experts = open_experts(experts, base)
    factorizations = Factorizations()
    merged: Merged | None = None
    merged_by: MergeMethod | None = None
    for setting in settings:
        if skip(setting):
            continue
        chosen = with_setting(method, setting)
        unscaled = replace(chosen, scale=method.scale)
        if merged is None or unscaled != merged_by:
            merged = None  # before the next one is made
            with factorizations.reused():
                merged, merged_by = merge(base, experts, unscaled, keep_update=True, **options), unscaled
        yield setting, merged.rescaled(chosen.scale)


def list_settings(method: MergeMethod, grid: SearchGrid | None = None) -> list[Setting]:
    """List every setting of a grid, ``scale`` last and varying fastest.

    Raises:
        MergeError: If a field is not known or has no values, or if a value is out of its range.
    """
    grid = grid or {"scale": SCALES}
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise MergeError(f"The grid's {name!r} must be a list of values to try, got {values!r}.")
        if not values:
            raise MergeError(f"The grid's {name!r} is empty; give at least one value to try, or leave it out.")
    axes = {name: values for name, values in grid.items() if name != "scale"} | {
        "scale": grid.get("scale", [method.scale])
    }
    distinct = [[value for i, value in enumerate(values) if value not in values[:i]] for values in axes.values()]
    settings = [dict(zip(axes, values, strict=True)) for values in product(*distinct)]
    raise_all(list(dict.fromkeys(problem for setting in settings if (problem := _problem(method, setting)))))
    return settings


def with_setting(method: MergeMethod, setting: Setting) -> MergeMethod:
    """Copy a method with other values of some of its fields, or of the fields of the method inside.

    Raises:
        MergeError: If a field is not known or its value is out of range.
    """
    kind, names = type(method).__name__, [field.name for field in fields(method)]
    changes: dict[str, Any] = {}
    inside: dict[str, Setting] = {}
    for path, value in setting.items():
        name, dot, inner_path = path.partition(".")
        if name not in names or (dot and not isinstance(getattr(method, name), MergeMethod)):
            raise MergeError(f"{kind} has no field {path!r} to try values of; it has {', '.join(names)}.")
        if name == "scale" and not _is_finite_number(value):
            raise MergeError(f"{kind}: scale must be a finite number, got {value!r}.")
        if dot:
            inside.setdefault(name, {})[inner_path] = value
        else:
            changes[name] = value
    changes |= {name: with_setting(getattr(method, name), below) for name, below in inside.items()}
    try:
        return replace(method, **changes)
    except (TypeError, ValueError) as error:
        raise MergeError(f"A value of the grid cannot be tried: {error}") from error


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _problem(method: MergeMethod, setting: Setting) -> str | None:
    try:
        with_setting(method, setting)
    except MergeError as error:
        return str(error)
    return None
