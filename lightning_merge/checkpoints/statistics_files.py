"""Files of statistics: Fisher information and Gram matrices of each expert's data, for the methods that need them.

Statistics come per expert, as a file or a state dict with one tensor for each parameter under the keys

* ``fisher.<parameter>``: the diagonal of the Fisher information, of the parameter's shape,
* ``gram.<parameter>``: the Gram matrix of the layer's inputs, ``(in, in)``,
* ``gram_out.<parameter>``: the Gram matrix of the gradients at the layer's outputs, ``(out, out)``,

and, for TACT, of every site that it corrects (see :mod:`lightning_merge.merging.recorded_moments`)

* ``mean.<site>``, ``var.<site>``: the mean and the variance of every channel over ``count.<site>`` values, where the
  channels lie along the axis ``axis.<site>`` of the activation.

``lightning-merge statistics`` and the callback ``RecordStatistics`` write them beside the expert's checkpoint, where a
merge finds them: ``expert.ckpt``, ``expert.statistics.safetensors``.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from lightning_merge.checkpoints.paths import local_path, shown_path
from lightning_merge.checkpoints.reading import STATISTICS, Source, open_weights
from lightning_merge.checkpoints.remote import is_there
from lightning_merge.checkpoints.safetensors_format import TASK_VECTOR
from lightning_merge.checkpoints.views import rename_statistics
from lightning_merge.checkpoints.weights import Weights
from lightning_merge.checkpoints.writing import save_tensors
from lightning_merge.utilities.errors import MergeError, problems_of, raise_all
from lightning_merge.utilities.schemas import check_schema

HOW_TO_MAKE = {
    "fisher": "the mean over the expert's examples of the squared gradient of log p(y | x)",
    "gram": "the mean of x xᵀ over the inputs x that the layer sees of the expert's data",
    "gram_out": "the mean of g gᵀ over the gradients g of the loss at the layer's outputs, on the expert's data",
}
"""The kinds of statistics, and how each is made."""


class _Expert(TypedDict):
    path: str | None
    digest: str


class _Noted(TypedDict):
    expert: _Expert


class _Recorded(_Noted, total=False):
    kinds: list[str]
    examples: int


def noted_of(statistics: Weights) -> _Recorded | None:
    """Return what a file of statistics says of itself; None where it was made by other means and does not say.

    Raises:
        MergeError: If it says something else.
    """
    noted = statistics.header.get("statistics")
    if noted is not None:
        check_schema(noted, _Recorded, f"The header of {statistics.name} is no record of statistics", "make them anew")
    return noted


def statistics_file(expert: Weights) -> Path | None:
    """Name the statistics file of an expert, beside its own, whether it exists or not; None for one in memory."""
    if expert.path is None:
        return None
    return expert.path.with_name(expert.path.stem.removesuffix(f".{TASK_VECTOR}") + STATISTICS)


def save_statistics(
    path: str | os.PathLike[str], statistics: Mapping[str, Tensor], expert: Weights, about: Mapping[str, Any]
) -> Path:
    """Write the statistics of one expert to a safetensors file, completely or not at all.

    Args:
        path: The file.
        statistics: A tensor for every ``kind.<parameter>``, of the shapes that this module's docstring gives.
        expert: The weights that they are of; their digest is noted, so that no other expert is merged by them.
        about: What else to note of how they were made: plain values.

    Returns:
        The path that was written.

    Raises:
        MergeError: If the file cannot be written.
    """
    path = local_path(path)
    noted = {"expert": {"path": shown_path(expert.path), "digest": expert.digest()}, **about}
    save_tensors(path, statistics, {"statistics": json.dumps(noted)})
    return path


def open_statistics(
    statistics: Mapping[str, Source] | None,
    needs: Sequence[str],
    base: Weights,
    experts: Mapping[str, Weights],
    names: Sequence[str],
    *,
    read: bool = True,
) -> list[Weights]:
    """Open the statistics of every expert, in the order of the experts, and check that they are of these models.

    Args:
        statistics: A source for each expert, by the expert's name; by default the file beside the expert's.
        needs: The kinds that the method needs. A Fisher is needed for every merged parameter; Gram matrices for those
            layers that have one (the others are averaged), the same layers in every expert.
        base: The base.
        experts: The experts by name.
        names: The merged parameters.
        read: Whether to read every expert, to check that the statistics are of these very weights.

    Returns:
        One source for each expert; none where the method needs no statistics.

    Raises:
        MergeError: If something is missing or belongs to another model; every problem is listed.
    """
    if not needs:
        return []
    files = {name: statistics_file(expert) for name, expert in experts.items()}
    statistics = {name: file for name, file in files.items() if file and is_there(file)} | dict(statistics or {})
    problems = _absent(statistics, needs, experts)
    opened = {}
    for name in (name for name in experts if name in statistics):
        source = statistics[name]
        try:
            weights = open_weights(source, None if _is_path(source) else f"the statistics of {name}")
        except MergeError as error:
            problems += error.problems
            continue
        problems += foreign_problems(weights, experts[name], name, needs) if read else []
        opened[name] = rename_statistics(weights, experts[name])
    for kind in needs:
        parameters = _wanted(kind, needs, opened, names)
        problems += [
            f"{source.name} holds no {kind}.<parameter> for any merged parameter; it must hold {HOW_TO_MAKE[kind]}: "
            f"`{command(experts[name], needs)}`."
            for name, source in opened.items()
            if not parameters
        ]
        problems += _problems(kind, parameters, base, opened)
    raise_all([*problems, *_strangers(base, experts, opened)])
    return list(opened.values())


def _absent(statistics: Mapping[str, Source], needs: Sequence[str], experts: Mapping[str, Weights]) -> list[str]:
    """List experts without statistics, and statistics without an expert, a sentence each."""
    how = "; ".join(f"{kind}.<parameter> holds {HOW_TO_MAKE[kind]}" for kind in needs)
    return [
        f"The method needs statistics of the data of expert {name}, and there are none beside its file; make them "
        f"with `{command(expert, needs)}`, or give merge(…, statistics={{{name!r}: file}}), a file or state dict "
        f"where {how}."
        for name, expert in experts.items()
        if name not in statistics
    ] + [
        f"There are statistics for {name!r}, which is no expert; the experts are {', '.join(experts)}."
        for name in statistics
        if name not in experts
    ]


def command(expert: Weights, kinds: Sequence[str]) -> str:
    """Build the command line that makes the statistics of an expert."""
    path = expert.path or Path("EXPERT.ckpt")
    if TASK_VECTOR in expert.header:  # they are collected of the checkpoint that it was taken from
        path = Path(expert.header[TASK_VECTOR]["expert"]["path"] or "EXPERT.ckpt")
    homes = [folder / "config.yaml" for folder in (path.parent, path.parent.parent)]
    config = next((file for file in homes if file.is_file()), "CONFIG.yaml")
    arguments = {"--config": config, "--expert": shown_path(path), "--kinds": f"[{', '.join(kinds)}]"}
    return shlex.join(["lightning-merge", "statistics", *(str(part) for pair in arguments.items() for part in pair)])


def foreign_problems(statistics: Weights, expert: Weights, name: str, kinds: Sequence[str]) -> list[str]:
    """Report statistics whose header says that they are of other weights; those made by other means do not say."""
    if problems := problems_of(noted_of, statistics):
        return problems
    noted = noted_of(statistics)
    if noted is None or noted["expert"]["digest"] == expert.digest():
        return []
    return [
        f"{statistics.name} holds the statistics of other weights than those of expert {name}; make them anew with "
        f"`{command(expert, kinds)}`."
    ]


def _is_path(source: Source) -> bool:
    return isinstance(source, (str, os.PathLike, Weights))


def _wanted(kind: str, needs: Sequence[str], opened: Mapping[str, Weights], names: Sequence[str]) -> list[str]:
    """List the parameters for which every expert must have a statistic."""
    if kind == "fisher":
        return list(names)
    grams = [kind] if kind == "gram_out" else [other for other in needs if other != "fisher"]
    return [n for n in names if any(f"{gram}.{n}" in source for gram in grams for source in opened.values())]


def _problems(kind: str, parameters: Sequence[str], base: Weights, opened: Mapping[str, Weights]) -> list[str]:
    problems = []
    for source in opened.values():
        for name in parameters:
            key, expected = f"{kind}.{name}", _expected_shape(kind, base.meta[name].shape)
            if key not in source:
                problems.append(f"{source.name} lacks {key!r}: {HOW_TO_MAKE[kind]}, of shape {expected}.")
            elif tuple(source.meta[key].shape) != expected:
                shape = tuple(source.meta[key].shape)
                problems.append(
                    f"{key!r} of {source.name} has shape {shape}, but the model's {name!r} asks for {expected}; "
                    f"make it with this expert: {HOW_TO_MAKE[kind]}."
                )
    return problems


def _expected_shape(kind: str, shape: torch.Size) -> tuple[int, ...]:
    if kind == "fisher":
        return tuple(shape)
    rows = shape[0] if shape else 1
    side = rows if kind == "gram_out" else shape.numel() // max(rows, 1)
    return side, side


def _strangers(base: Weights, experts: Mapping[str, Weights], opened: Mapping[str, Weights]) -> list[str]:
    return [
        f"{source.name} holds {key!r}, but the model has no such parameter; are these the statistics of another model?"
        for name, source in opened.items()
        for key in source
        for kind, _, parameter in [key.partition(".")]
        if kind in HOW_TO_MAKE and parameter not in base and parameter not in experts[name]
    ]
