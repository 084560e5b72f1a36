"""What the jobs of a benchmark leave in their folders, as types that are checked when it is read again."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from lightning_merge.utilities.schemas import Where

_Score = Annotated[
    Any, Where("a number, perhaps NaN", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool))
]


class _OfDomain(TypedDict):
    row: str
    domain: str
    method: dict[str, Any] | None
    accuracy: _Score
    balanced_accuracy: _Score
    f1: _Score
    calibration_error: _Score


class HeldOut(TypedDict, total=False):
    """Results of a benchmark that leaves one domain out."""

    records: list[_OfDomain]
    updates: dict[str, dict[str, _Score]]


class _OfTask(TypedDict):
    seed: int
    merged: int
    arm: str
    method: str
    task: str
    accuracy: _Score
    expert: _Score


class OfFoundations(TypedDict):
    """Results of a benchmark of several foundations."""

    records: list[_OfTask]
