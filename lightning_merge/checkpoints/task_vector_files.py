"""Task vectors as files: the difference of an expert to its base.

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

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

import torch
from torch import Tensor

from lightning_merge.checkpoints.differences import Change, Dense, Difference, Product
from lightning_merge.checkpoints.paths import local_path, shown_path
from lightning_merge.checkpoints.reading import Source, open_weights
from lightning_merge.checkpoints.remote import fetch
from lightning_merge.checkpoints.safetensors_format import TASK_VECTOR, open_safetensors
from lightning_merge.checkpoints.weights import Weights
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.schemas import check_schema, shown

_FORMAT = 1
_SUFFIX = f".{TASK_VECTOR}.safetensors"


class _Model(TypedDict):
    path: str | None
    digest: str


class _Header(TypedDict):
    base: _Model
    expert: _Model
    relative_error: float
    exclude: list[str]
    missing: list[str]
    tied: dict[str, str]


def task_vector_file(checkpoint: Path) -> Path:
    """Name the file of the task vector next to a checkpoint ``NAME.ckpt``."""
    return checkpoint.with_name(checkpoint.stem + _SUFFIX)


def _decode(parts: Mapping[str, Callable[[], Tensor]]) -> Change:
    return Dense(parts["delta"]) if "delta" in parts else Product(A=parts["right"], B=parts["left"])


def is_task_vector(source: Source) -> TypeGuard[str | os.PathLike[str]]:
    """Tell whether a source is the file of a task vector, by its header."""
    if not isinstance(source, (str, os.PathLike)):
        return False
    try:
        if local_path(source).suffix != ".safetensors" or not os.path.isfile(path := fetch(source)):
            return False
        return TASK_VECTOR in open_safetensors(str(source), path).header
    except MergeError:
        return False  # whoever opens it says what is wrong with it


class TaskVector(Difference):
    """An expert that is kept as a task vector."""

    def digest(self) -> str:
        """Return the expert's digest, which its statistics name; of an inexact or partial file, that of its weights."""
        about = self.header[TASK_VECTOR]
        return about["expert"]["digest"] if not (about["relative_error"] or about["exclude"]) else super().digest()


def open_task_vector(
    path: str | os.PathLike[str], base: Source, *, name: str | None = None, read: bool = True
) -> TaskVector:
    """Open the file of a task vector as the expert that it makes of its base.

    ``lightning_merge.save_weights("expert.ckpt", open_task_vector(path, base))`` writes that expert as a checkpoint.
    The differences are exact; the weights are the base with them added, whose last digits may not be the expert's.

    Args:
        path: The file, see :func:`lightning_merge.save_task_vector`.
        base: The model that it is the difference to.
        name: What to call this expert in messages; by default the path.
        read: Whether to read the base, to check that it is that very model; else only names and shapes are compared.

    Returns:
        All parameters of the expert; those that differ from the base's are at least float32.

    Raises:
        MergeError: If there is no such file, or if it is the difference to another base.
    """
    origin, file = open_weights(base, "base"), fetch(path)
    name = name or str(path)
    stored = open_safetensors(name, file)
    about = stored.header.get(TASK_VECTOR)
    if about is None:
        raise MergeError(f"{file} is no task vector; lightning_merge.save_task_vector writes one.")
    if about.get("format") != _FORMAT:
        raise MergeError(
            f"{file} is a task vector of format {shown(about.get('format'))}, and this lightning_merge reads format "
            f"{_FORMAT}; install the version that wrote it ({shown(about.get('lightning_merge'))}), or a newer one."
        )
    anew = "write it anew with lightning_merge.save_task_vector"
    check_schema(about, _Header, f"{file} is damaged, as its header is not that of a task vector", anew)
    if read and origin.digest() != about["base"]["digest"]:
        raise MergeError(
            f"{_which(name, about)}, and {_where(origin)} is another model ({_short(origin.digest())}); give that base."
        )
    parts, problems = _sort(stored, origin, about)
    raise_all(problems)
    own_keys = {parameter: f"own.{parameter}" for parameter, kinds in parts.items() if "own" in kinds}
    changes = {
        parameter: _decode({kind: partial(stored.__getitem__, f"{kind}.{parameter}") for kind in kinds})
        for parameter, kinds in parts.items()
        if parameter not in own_keys
    }
    return TaskVector(name, stored, origin, changes, own_keys, about["missing"], about["tied"])


def _sort(stored: Weights, base: Weights, about: Mapping[str, Any]) -> tuple[dict[str, set[str]], list[str]]:
    """Find in which form the file holds each parameter, and what does not fit the base.

    Args:
        stored: What the file holds.
        base: The base that it is opened over.
        about: What the header says of the task vector.

    Returns:
        The kinds of tensors of every parameter (``{"delta"}``, ``{"left", "right"}`` or ``{"own"}``), and the problems.
    """
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
        elif (shape := _shapes(stored, parameter, kinds)) != (wanted := _wanted(base.meta[parameter].shape, kinds)):
            problems.append(
                f"{_which(stored.name, about)}, and its difference of {parameter!r} is {shape} where {_where(base)} "
                f"asks for {wanted}."
            )
    return parts, problems


def _shapes(stored: Weights, parameter: str, kinds: set[str]) -> tuple[int, ...]:
    """Read the shape of a difference, or the outer sides of its factors."""
    if "delta" in kinds:
        return tuple(stored.meta[f"delta.{parameter}"].shape)
    left, right = (stored.meta[f"{kind}.{parameter}"].shape for kind in ("left", "right"))
    return (left[0], right[1]) if len(left) == len(right) == 2 and left[1] == right[0] else (*left, *right)


def _wanted(shape: torch.Size, kinds: set[str]) -> tuple[int, ...]:
    return tuple(shape) if "delta" in kinds else (shape[0], math.prod(shape[1:])) if shape else ()


def _which(name: str, about: Mapping[str, Any]) -> str:
    """Begin a sentence that says of which base a task vector is."""
    path, digest = about["base"]["path"], about["base"]["digest"]
    return f"The task vector {name} is the difference to {path or 'a base in memory'} ({_short(digest)})"


def _where(base: Weights) -> str:
    return shown_path(base.path) or "the base in memory"


def _short(digest: str) -> str:
    return f"content sha256 {digest[:12]}…"
