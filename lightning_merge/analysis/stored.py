"""A comparison as plain values, to be kept beside results: numbers with fewer digits, and no more than plots need."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_merge.analysis.records import MatrixComparison, ParameterComparison
from lightning_merge.analysis.score_map import pool
from lightning_merge.utilities.errors import MergeError

_VALUES = 256
"""The most singular values of a spectrum; those that follow are left out."""
_MAP = 64
"""The size that a map of SCORE is reduced to."""
_MAPS = 12
"""The most maps; those of the layers between are left out."""
_DIGITS = {"products": 12, "merged_products": 12, "merged_squares": 12}
"""Significant digits, where it is not four: distances are differences of these."""


def to_plain(
    experts: Sequence[str],
    merged: Sequence[str],
    parameters: Sequence[ParameterComparison],
    matrices: Sequence[MatrixComparison],
    left_out: Sequence[str],
    rank_rule: str,
) -> dict[str, Any]:
    """Make plain values of the fields of a comparison, which JSON can hold: NaN is None.

    Args:
        experts: The names of the experts.
        merged: The names of the merged models.
        parameters: What was measured of every parameter.
        matrices: What was measured of every matrix.
        left_out: The matrices whose subspaces were not compared.
        rank_rule: How the rank of an expert's leading subspace was chosen.
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
    """Read the fields of a comparison from what :func:`to_plain` gave.

    Raises:
        MergeError: If they are none.
    """
    try:
        return {
            "experts": plain["experts"],
            "merged": plain["merged"],
            "parameters": [ParameterComparison(**_read(record)) for record in plain["parameters"]],
            "matrices": [MatrixComparison(**_read(record)) for record in plain["matrices"]],
            "left_out": plain["left_out"],
            "rank_rule": plain["rank_rule"],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise MergeError(
            f"This is no comparison of experts as Comparison.to_dict() gives it ({type(error).__name__}: {error}); "
            "compare the experts anew."
        ) from error


def _reduced(matrix: MatrixComparison, with_map: bool) -> MatrixComparison:
    return dataclasses.replace(
        matrix,
        spectra=matrix.spectra[:, :_VALUES],
        merged_spectra={name: spectrum[:_VALUES] for name, spectrum in matrix.merged_spectra.items()},
        resolved=pool(matrix.resolved, _MAP) if with_map else None,
    )


def _record(found: ParameterComparison | MatrixComparison) -> dict[str, Any]:
    return {
        field.name: _plain(getattr(found, field.name), _DIGITS.get(field.name, 4))
        for field in dataclasses.fields(found)
    }


def _plain(value: Any, digits: int) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist(), digits)
    if isinstance(value, Mapping):
        return {name: _plain(own, digits) for name, own in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(own, digits) for own in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def _read(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if name in ("shape", "ranks") else _tensors(value) for name, value in record.items()}


def _tensors(value: Any) -> Any:
    """Lists as tensors in float64, in which None is NaN."""
    if isinstance(value, Mapping):
        return {name: _tensors(own) for name, own in value.items()}
    return torch.tensor(_with_nan(value), dtype=torch.float64) if isinstance(value, list) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(own) for own in value]
    return math.nan if value is None else value
