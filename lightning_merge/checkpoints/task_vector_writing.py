"""Write a task vector: the difference of an expert to its base."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge import __version__
from lightning_merge.checkpoints.names import is_of_one_kind, is_running_statistic, matches, unused_patterns
from lightning_merge.checkpoints.paths import local_path, shown_path
from lightning_merge.checkpoints.reading import Source, open_weights
from lightning_merge.checkpoints.safetensors_format import TASK_VECTOR
from lightning_merge.checkpoints.task_vector_files import _FORMAT, _SUFFIX, _decode
from lightning_merge.checkpoints.views import match_names, own_names
from lightning_merge.checkpoints.weights import Weights
from lightning_merge.checkpoints.writing import check_dtypes, check_output, save_tensors
from lightning_merge.utilities.errors import MergeError, problems_of, raise_all
from lightning_merge.utilities.linalg import svd
from lightning_merge.utilities.tensors import is_finite, wide, without_masks

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def save_task_vector(
    path: str | os.PathLike[str],
    base: Source,
    expert: Source,
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    exclude: Sequence[str] = (),
) -> Path:
    """Write the difference of an expert to its base to a file, completely or not at all.

    Without ``rank`` and ``dtype`` the merged parameters are, to the same bits, those that the expert itself gives. What
    is excluded from a merge and kept for a task is the base's with the difference added (a head that the base has,
    too): its last digits may be others, and it is at least float32.

    Args:
        path: The file; ends in ``.safetensors``, best in ``.task_vector.safetensors``.
        base: The model that the expert was fine-tuned from.
        expert: The expert; its names may differ from the base's by what stands before them.
        rank: Truncate the difference of every matrix to this rank, where its factors are smaller than the difference.
        dtype: Store the differences in this precision: ``torch.float32``, ``torch.bfloat16`` or ``torch.float16``; by
            default in that in which they are taken, float32 (float64 for weights that are).
        exclude: Leave out the parameters that match one of these shell patterns; the file then says nothing of them.

    Returns:
        The path that was written.

    Raises:
        MergeError: If the expert was not fine-tuned from this base, or if the file cannot be written.
    """
    path, origin = local_path(path), own_names(open_weights(base, "base"))
    fitted = match_names(origin, open_weights(expert, "the expert" if isinstance(expert, Mapping) else None))
    check_task_vector(path, origin, fitted, rank, dtype, exclude)
    tensors, about = take_task_vector(origin, fitted, rank, dtype, exclude)
    save_tensors(path, tensors, {TASK_VECTOR: json.dumps(about)})
    return path


def check_task_vector(
    path: Path | None,
    base: Weights,
    expert: Weights,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    exclude: Sequence[str] = (),
) -> None:
    """Raise a :class:`MergeError` if a task vector cannot be saved (:func:`save_task_vector`), from headers alone."""
    problems = []
    if rank is not None and not (isinstance(rank, int) and rank >= 1):
        problems.append(f"The rank of a task vector must be a whole number of at least 1, got {rank}.")
    if dtype not in (None, *_DTYPES):
        problems.append(f"A task vector is stored in float32, bfloat16 or float16, not in {dtype}.")
    if path is not None:
        check_output(path, [base, expert])
        if path.suffix != ".safetensors":
            problems.append(f"A task vector is a safetensors file; end {path} in {_SUFFIX}.")
    shared = [name for name in base if _is_difference(name, base, expert)]
    like = {name: meta.dtype for name, meta in base.meta.items()}
    whole = {name: meta for name, meta in expert.meta.items() if name not in shared and like.get(name) != meta.dtype}
    whole = {name: meta for name, meta in whole.items() if not matches(name, exclude)}
    problems += problems_of(check_dtypes, path or _SUFFIX, whole)
    if not shared or not is_of_one_kind(list(base), expert):
        problems.append(
            f"{expert.name} is no fine-tuned form of the base: of the base's {len(base)} parameters it has "
            f"{sum(name in expert for name in base)}; give the base that it was fitted from."
        )
    raise_all([*problems, *unused_patterns(base, [expert], exclude)])


def take_task_vector(
    base: Weights,
    expert: Weights,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    exclude: Sequence[str] = (),
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Compute the difference of an expert to its base, see :func:`save_task_vector`.

    Returns:
        The tensors of the file, whose shapes :mod:`lightning_merge.checkpoints.task_vector_files` gives, and its
        header: ``relative_error`` is ``‖Δ - Δ_stored‖ / ‖Δ‖`` over the model.

    Raises:
        MergeError: If a difference is not finite, or is not in ``dtype``.
    """
    tied = {
        alias: owner
        for alias, owner in _tied(base, expert).items()
        if matches(alias, exclude) == matches(owner, exclude)
    }
    tensors: dict[str, Tensor] = {}
    lost = whole = 0.0
    for name in expert:
        if name in tied or matches(name, exclude):
            continue
        weight = expert[name].detach().cpu()
        if not _is_difference(name, base, expert):
            if not (name in base and _is_same(weight, base[name].cpu())):
                tensors[f"own.{name}"] = weight.clone()  # it may share memory with another one
            continue
        new, old = wide(weight), wide(base[name].detach().cpu())
        delta = new - old
        if not is_finite(delta):
            delta = torch.sub(*without_masks(new, old))
        if not delta.any():
            continue
        parts = _encode(name, delta, rank, dtype)
        tensors |= {f"{kind}.{name}": part for kind, part in parts.items()}
        stored = _decode({kind: partial(parts.__getitem__, kind) for kind in parts}).delta(delta.shape)
        lost += float((delta.double() - stored).square().sum())
        whole += float(delta.double().square().sum())
    about = {
        "format": _FORMAT,
        "base": {"path": shown_path(base.path), "digest": base.digest()},
        "expert": {"path": shown_path(expert.path), "digest": expert.digest()},
        "rank": rank,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "relative_error": math.sqrt(lost / whole) if whole else 0.0,
        "exclude": list(exclude),
        "missing": [name for name in base if name not in expert and not matches(name, exclude)],
        "tied": tied,
        "lightning_merge": __version__,
    }
    return tensors, about


def _is_difference(name: str, base: Weights, expert: Weights) -> bool:
    """Tell whether an expert's parameter is stored as a difference to the base's, as running statistics never are."""
    if name not in base or name not in expert or is_running_statistic(name):
        return False
    old, new = base.meta[name], expert.meta[name]
    return old.shape == new.shape and old.is_floating_point() and new.is_floating_point()


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _tied(base: Weights, expert: Weights) -> dict[str, str]:
    """Find the expert's tied names, ``{alias: name}``, without those that are two tensors in the base."""

    def is_one(alias: str, owner: str) -> bool:
        return alias not in base or (owner in base and base.tied.get(alias, alias) == base.tied.get(owner, owner))

    return {alias: owner for alias, owner in expert.tied.items() if is_one(alias, owner)}


def _encode(name: str, delta: Tensor, rank: int | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Encode a difference ``(…)`` for the file: as it is, or, where that is smaller, as two factors of equal norms."""
    if not is_finite(delta):
        raise MergeError(f"{name!r} differs from the base by values that are not finite; did the training diverge?")
    parts = {"delta": delta}
    if rank is not None and delta.ndim >= 2:
        matrix = delta.flatten(1)  # (out, in · …)
        m, n = matrix.shape
        if rank * (m + n) < m * n:
            U, s, Vt = svd(matrix, rank)
            there = s > 0
            root = s[there].sqrt()
            parts = {"left": U[:, there] * root, "right": root.unsqueeze(-1) * Vt[there]}
    stored = {kind: part if dtype is None else part.to(dtype) for kind, part in parts.items()}
    if not all(map(is_finite, stored.values())):
        raise MergeError(f"The difference of {name!r} to the base is too large for {dtype}; store it in bfloat16.")
    return stored
