"""Task vectors as files: what an expert differs by from its base, and nothing else.

A ``NAME.task_vector.safetensors`` holds for every parameter that differs from the base

* ``delta.<parameter>``: the difference, of the parameter's shape, or
* ``left.<parameter>`` ``(m, r)`` and ``right.<parameter>`` ``(r, n)``: the factors of the difference, truncated to rank
  r (a convolution kernel is a matrix ``(out, in · height · width)``), or
* ``own.<parameter>``: the expert's values as they are, where they are no difference: a head that the base lacks or has
  in another shape, integer buffers, BatchNorm's running statistics.

The header says of which base and which expert, by the sha256 of their names, types, shapes and values, whatever file
they are in. Over its base, the file is an expert wherever experts are given.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge import __version__
from lightning_merge.checkpoints import (
    TASK_VECTOR,
    Source,
    Weights,
    check_dtypes,
    check_output,
    open_safetensors,
    open_weights,
    save_tensors,
)
from lightning_merge.differences import Change, Dense, Difference, Product
from lightning_merge.errors import MergeError, problems_of, raise_all
from lightning_merge.inventory import is_of_one_kind, is_running_statistic, unused_patterns
from lightning_merge.linalg import is_finite, svd
from lightning_merge.matrices import Matrices, matches
from lightning_merge.prefixes import match_names, own_names
from lightning_merge.task_vectors import wide

_FORMAT = 1
_SUFFIX = f".{TASK_VECTOR}.safetensors"
_HEADER = {"base": dict, "expert": dict, "relative_error": float, "exclude": list, "missing": list, "tied": dict}
_MODEL = {"path": (str, type(None)), "digest": str}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MATRICES = Matrices(exclude=(), flatten_convolutions=True)


def task_vector_file(checkpoint: Path) -> Path:
    """What the task vector beside a checkpoint ``NAME.ckpt`` is called."""
    return checkpoint.with_name(checkpoint.stem + _SUFFIX)


def save_task_vector(
    path: str | os.PathLike[str],
    base: Source,
    expert: Source,
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    exclude: Sequence[str] = (),
) -> Path:
    """Write what an expert differs by from its base to a file, completely or not at all.

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
        MergeError: If the expert is none of this base, or if the file cannot be written.
    """
    path, origin = Path(path).expanduser(), own_names(open_weights(base, "base"))
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
    own = {name: meta for name, meta in expert.meta.items() if name not in shared and like.get(name) != meta.dtype}
    own = {name: meta for name, meta in own.items() if not matches(name, exclude)}
    problems += problems_of(check_dtypes, path or _SUFFIX, own)
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
    """Take the difference of an expert to its base, see :func:`save_task_vector`.

    Returns:
        What the file holds, and what its header says: ``relative_error`` is ``‖Δ - Δ_stored‖ / ‖Δ‖`` over the model.

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
        delta = wide(weight) - wide(base[name].detach().cpu())
        if not delta.any():
            continue
        parts = _encode(name, delta, rank, dtype)
        tensors |= {f"{kind}.{name}": part for kind, part in parts.items()}
        stored = _decode({kind: lambda part=part: part for kind, part in parts.items()}).delta(delta.shape)
        lost += float((delta.double() - stored).square().sum())
        whole += float(delta.double().square().sum())
    about = {
        "format": _FORMAT,
        "base": {"path": str(base.path) if base.path else None, "digest": base.digest()},
        "expert": {"path": str(expert.path) if expert.path else None, "digest": expert.digest()},
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
    """Whether an expert's parameter is the base's, moved; running statistics are never seen as differences."""
    if name not in base or name not in expert or is_running_statistic(name):
        return False
    mine, theirs = base.meta[name], expert.meta[name]
    return mine.shape == theirs.shape and mine.is_floating_point() and theirs.is_floating_point()


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _tied(base: Weights, expert: Weights) -> dict[str, str]:
    """The expert's names for a tensor that has another name, unless they are two tensors in the base."""

    def is_one(alias: str, owner: str) -> bool:
        return alias not in base or (owner in base and base.tied.get(alias, alias) == base.tied.get(owner, owner))

    return {alias: owner for alias, owner in expert.tied.items() if is_one(alias, owner)}


def _encode(name: str, delta: Tensor, rank: int | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """How a difference ``(…)`` is stored: as it is, or, where that is smaller, as two factors with equal norms."""
    if not is_finite(delta):
        raise MergeError(f"{name!r} differs from the base by values that are not finite; did the training diverge?")
    parts = {"delta": delta}
    view = _MATRICES.view(name, delta.shape)
    if rank is not None and view is not None:
        _, m, n = view
        if rank * (m + n) < m * n:
            U, s, Vt = svd(delta.reshape(m, n), rank)
            there = s > 0
            root = s[there].sqrt()
            parts = {"left": U[:, there] * root, "right": root.unsqueeze(-1) * Vt[there]}
    stored = {kind: part if dtype is None else part.to(dtype) for kind, part in parts.items()}
    if not all(map(is_finite, stored.values())):
        raise MergeError(f"The difference of {name!r} to the base is too large for {dtype}; store it in bfloat16.")
    return stored


def _decode(parts: Mapping[str, Callable[[], Tensor]]) -> Change:
    return Dense(parts["delta"]) if "delta" in parts else Product(A=parts["right"], B=parts["left"])


def is_task_vector(source: Source) -> bool:
    """Whether a source is the file of a task vector, by its header."""
    if not isinstance(source, (str, os.PathLike)):
        return False
    path = Path(source).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        return TASK_VECTOR in open_safetensors(str(source), path).header
    except MergeError:
        return False  # whoever opens it says what is wrong with it


class TaskVector(Difference):
    """An expert that is kept as a task vector."""

    def digest(self) -> str:
        """The expert's own digest, by which its statistics know it; if the file holds less than that, of what it is."""
        about = self.header[TASK_VECTOR]
        return about["expert"]["digest"] if not (about["relative_error"] or about["exclude"]) else super().digest()


def open_task_vector(
    path: str | os.PathLike[str], base: Source, *, name: str | None = None, read: bool = True
) -> TaskVector:
    """Open the file of a task vector as the expert that it makes of its base.

    ``lightning_merge.save_weights("expert.ckpt", open_task_vector(path, base))`` writes that expert as a checkpoint.
    The differences are exact; the weights are the base with them added, whose last digits may not be the expert's.

    Args:
        path: The file, see :func:`save_task_vector`.
        base: The model that it is the difference to.
        name: What to call this expert in messages; by default the path.
        read: Whether to read the base, to see that it is that very model; otherwise only names and shapes are compared.

    Returns:
        All parameters of the expert; those that differ from the base's are at least float32.

    Raises:
        MergeError: If there is no such file, or if it is the difference to another base.
    """
    origin, file = open_weights(base, "base"), Path(path).expanduser()
    name = name or str(path)
    stored = open_safetensors(name, file)
    about = stored.header.get(TASK_VECTOR)
    if about is None:
        raise MergeError(f"{file} is no task vector; lightning_merge.save_task_vector writes one.")
    if about.get("format") != _FORMAT:
        raise MergeError(
            f"{file} is a task vector of format {about.get('format')}, and this version of lightning_merge reads "
            f"format {_FORMAT}; install the one that wrote it ({about.get('lightning_merge')}), or a newer one."
        )
    _check_header(file, about)
    if read and origin.digest() != about["base"]["digest"]:
        raise MergeError(
            f"{_which(name, about)}, and {_where(origin)} is another model ({_short(origin.digest())}); give that base."
        )
    parts, problems = _sort(stored, origin, about)
    raise_all(problems)
    own = {parameter: f"own.{parameter}" for parameter, kinds in parts.items() if "own" in kinds}
    changes = {
        parameter: _decode({kind: lambda key=f"{kind}.{parameter}": stored[key] for kind in kinds})
        for parameter, kinds in parts.items()
        if parameter not in own
    }
    return TaskVector(name, stored, origin, changes, own, about["missing"], about["tied"])


def _check_header(file: Path, about: Mapping[str, Any]) -> None:
    """Raise a :class:`MergeError` unless the header says all that is relied on."""
    wrong = [key for key, kind in _HEADER.items() if not isinstance(about.get(key), kind)]
    for model in (key for key in ("base", "expert") if key not in wrong):
        wrong += [f"{model}.{key}" for key, kind in _MODEL.items() if not isinstance(about[model].get(key, 0), kind)]
    if wrong:
        raise MergeError(
            f"{file} is damaged: its header does not say {', '.join(wrong)}, as that of a task vector does; write it "
            "anew with lightning_merge.save_task_vector."
        )


def _sort(stored: Weights, base: Weights, about: Mapping[str, Any]) -> tuple[dict[str, set[str]], list[str]]:
    """In which form the file holds each parameter, and what does not fit the base."""
    parts: dict[str, set[str]] = {}
    for key in stored:
        kind, _, parameter = key.partition(".")
        parts.setdefault(parameter, set()).add(kind)
    problems = []
    for parameter, kinds in parts.items():
        if kinds == {"own"}:
            continue
        if kinds not in ({"delta"}, {"left", "right"}):
            problems.append(f"{stored.path} is damaged: of {parameter!r} it holds {', '.join(sorted(kinds))}.")
        elif parameter not in base:
            problems.append(f"{_which(stored.name, about)}, and {_where(base)} lacks {parameter!r}.")
        elif (found := _shapes(stored, parameter, kinds)) != (wanted := _wanted(base.meta[parameter].shape, kinds)):
            problems.append(
                f"{_which(stored.name, about)}, and its difference of {parameter!r} is {found} where {_where(base)} "
                f"asks for {wanted}."
            )
    return parts, problems


def _shapes(stored: Weights, parameter: str, kinds: set[str]) -> tuple[int, ...]:
    """The shape of a difference, or the outer sides of its factors."""
    if "delta" in kinds:
        return tuple(stored.meta[f"delta.{parameter}"].shape)
    left, right = (stored.meta[f"{kind}.{parameter}"].shape for kind in ("left", "right"))
    return (left[0], right[1]) if len(left) == len(right) == 2 and left[1] == right[0] else (*left, *right)


def _wanted(shape: torch.Size, kinds: set[str]) -> tuple[int, ...]:
    return tuple(shape) if "delta" in kinds else (shape[0], math.prod(shape[1:])) if shape else ()


def _which(name: str, about: Mapping[str, Any]) -> str:
    """The beginning of a sentence that says of which base a task vector is."""
    path, digest = about["base"]["path"], about["base"]["digest"]
    return f"The task vector {name} is the difference to {path or 'a base in memory'} ({_short(digest)})"


def _where(base: Weights) -> str:
    return str(base.path or "the base in memory")


def _short(digest: str) -> str:
    return f"content sha256 {digest[:12]}…"
