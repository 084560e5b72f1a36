"""A comparison as plain values, to be kept beside results: numbers with fewer digits, and no more than plots need."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from lightning_merge.analysis.records import MatrixComparison, ParameterComparison
from lightning_merge.analysis.score_map import pool
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.schemas import check_schema

_VALUES = 256
"""The most singular values of a spectrum; those that follow are left out."""
_MAP = 64
"""The size that a map of SCORE is reduced to."""
_MAPS = 12
"""The most maps; those of the layers between are left out."""
_DIGITS = {"products": 12, "merged_products": 12, "merged_squares": 12, "base_square": 12, "base_products": 12}
"""Significant digits, where it is not four: distances are differences of these."""


class _Plain(TypedDict):
    experts: list[str]
    merged: list[str]
    parameters: list[ParameterComparison]
    matrices: list[MatrixComparison]
    left_out: list[str]
    rank_rule: str


def to_plain(
    experts: Sequence[str],
    merged: Sequence[str],
    parameters: Sequence[ParameterComparison],
    matrices: Sequence[MatrixComparison],
    left_out: Sequence[str],
    rank_rule: str,
) -> dict[str, Any]:
    """Convert the fields of a comparison to plain values that JSON can hold; NaN becomes None.

    Args:
        experts: The names of the experts.
        merged: The names of the merged models.
        parameters: The records of all parameters.
        matrices: The records of all matrices that were compared.
        left_out: The names of matrices whose subspaces were not compared.
        rank_rule: The rule by which the rank of a leading subspace was chosen, in words.
    """
    with_map = [i for i, matrix in enumerate(matrices) if matrix.resolved is not None]
    count = min(len(with_map), _MAPS)
    kept = {with_map[i * (len(with_map) - 1) // max(count - 1, 1)] for i in range(count)}
    return {
        "experts": list(experts),
        "merged": list(merged),
        "rank_rule": rank_rule,
        "left_out": list(left_out),
        "parameters": [_record(parameter) for parameter in parameters],
        "matrices": [_record(_reduced(matrix, i in kept)) for i, matrix in enumerate(matrices)],
    }


def from_plain(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields of a comparison from what :func:`to_plain` returned.

    Raises:
        MergeError: If the values are not those of a comparison.
    """
    what, remedy = "This is no comparison of experts as Comparison.to_dict() gives it", "compare the experts anew"
    check_schema(plain, dict[str, Any], what, remedy)
    check_schema({key: _numbered(value) for key, value in plain.items()}, _Plain, what, remedy)
    try:
        parameters = [ParameterComparison(**_read(record)) for record in plain["parameters"]]
        matrices = [MatrixComparison(**_read(record)) for record in plain["matrices"]]
    except ValueError as error:  # rows of different lengths
        raise MergeError(f"{what}: {error}; {remedy}.") from error
    T = len(plain["experts"])
    square = {parameter.name: parameter.products for parameter in parameters}
    square |= {f"{matrix.name} ": part for matrix in matrices for part in (matrix.alignment, matrix.angles)}
    if wrong := [name for name, part in square.items() if part.shape != (T, T)]:
        raise MergeError(f"{what}: of {wrong[0].strip()!r} there are not {T} × {T} numbers, experts squared; {remedy}.")
    return {**plain, "parameters": parameters, "matrices": matrices}


def _numbered(records: Any) -> Any:
    """Put a number where a mapping of a record has None, which is NaN."""
    if not isinstance(records, list):
        return records
    return [
        {
            key: {k: 0.0 if v is None else v for k, v in value.items()} if isinstance(value, dict) else value
            for key, value in record.items()
        }
        if isinstance(record, dict)
        else record
        for record in records
    ]


def _reduced(matrix: MatrixComparison, with_map: bool) -> MatrixComparison:
    return dataclasses.replace(
        matrix,
        spectra=matrix.spectra[:, :_VALUES],
        merged_spectra={name: spectrum[:_VALUES] for name, spectrum in matrix.merged_spectra.items()},
        resolved=pool(matrix.resolved, _MAP) if with_map and matrix.resolved is not None else None,
    )


def _record(comparison: ParameterComparison | MatrixComparison) -> dict[str, Any]:
    return {
        field.name: _plain(getattr(comparison, field.name), _DIGITS.get(field.name, 4))
        for field in dataclasses.fields(comparison)
    }


def _plain(value: Any, digits: int) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist(), digits)
    if isinstance(value, Mapping):
        return {name: _plain(item, digits) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def _read(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if name in ("shape", "ranks") else _tensors(value) for name, value in record.items()}


def _tensors(value: Any) -> Any:
    """Convert lists to tensors in float64, in which None is NaN."""
    if isinstance(value, Mapping):
        return {name: _tensors(item) for name, item in value.items()}
    return torch.tensor(_with_nan(value), dtype=torch.float64) if isinstance(value, list) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value
