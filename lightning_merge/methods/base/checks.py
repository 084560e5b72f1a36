"""Check a method's hyper-parameters."""

from __future__ import annotations

from typing import Protocol

from lightning_merge.methods.base.method import MergeMethod
from lightning_merge.utilities.errors import MergeError


class _Weighted(Protocol):
    """A method that may be given a weight for every expert."""

    @property
    def weights(self) -> tuple[float, ...] | None: ...


def check_range(
    method: MergeMethod, name: str, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raise a MergeError that names the allowed range unless ``low <= method.name <= high`` (or ``<`` where open)."""
    value = getattr(method, name)
    above = value > low if open_low else value >= low
    under = value < high if open_high else value <= high
    if not (above and under):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise MergeError(f"{type(method).__name__}: {name} must lie in {interval}, got {value!r}.")


def check_choice(method: MergeMethod, name: str, choices: tuple[str, ...]) -> None:
    """Raise a MergeError that names the choices unless ``method.name`` is one of them."""
    value = getattr(method, name)
    if value not in choices:
        raise MergeError(f"{type(method).__name__}: {name} must be one of {', '.join(choices)}, got {value!r}.")


def check_weights(method: _Weighted) -> None:
    """Convert ``method.weights``, where given, to a tuple of floats; raise a ValueError if they are no weights."""
    if method.weights is None:
        return
    weights = tuple(float(weight) for weight in method.weights)
    if not (all(0 <= weight < float("inf") for weight in weights) and any(weights)):
        raise ValueError(
            f"{type(method).__name__}: weights must lie in [0, inf) and not all be zero, got {list(weights)}."
        )
    object.__setattr__(method, "weights", weights)


def check_weight_count(method: _Weighted, num_experts: int) -> None:
    """Raise a MergeError unless there is a weight for every expert, or no weights at all."""
    if method.weights is not None and len(method.weights) != num_experts:
        raise MergeError(
            f"{type(method).__name__} has {len(method.weights)} weights for {num_experts} experts; give one for each."
        )
