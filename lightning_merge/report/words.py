"""Numbers and lists in sentences."""

from __future__ import annotations

from collections.abc import Sequence


def percent(share: float) -> str:
    """Write a share in percent, without the sign: 0.689 is 68.9."""
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """Write a difference of shares in percentage points, without the unit."""
    return f"{100 * difference:.1f}"


def count(number: int, noun: str, nouns: str | None = None) -> str:
    """Write a number of things: ``1 method``, ``3 methods``, ``3 matrices``."""
    return f"{number} {noun if number == 1 else nouns or f'{noun}s'}"


def listed(words: Sequence[str], most: int = 6) -> str:
    """Join words in a sentence: ``a, b and c``; of very many the first ones, and how many more there are."""
    words = list(words)
    if len(words) > most:
        words = [*words[: most - 1], f"{len(words) - most + 1} more"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def extremes(values: Sequence[float], names: Sequence[str]) -> tuple[str, str] | None:
    """Find the names of the smallest and the largest value; None where they hardly differ."""
    (least, first), *_, (most, last) = [*sorted(zip(values, names, strict=True), key=lambda pair: pair[0])] * 2
    return (first, last) if most - least > 1e-3 * abs(most) else None
