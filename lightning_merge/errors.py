"""The one error that this package raises about its inputs: sentences that a user can act on."""

from __future__ import annotations

from collections.abc import Sequence


class MergeError(ValueError):
    """Something about the inputs cannot work; the message says what, where, and what to do."""


def raise_all(problems: Sequence[str], *, limit: int = 20) -> None:
    """Raise one :class:`MergeError` that lists every problem found, or return if there is none."""
    if not problems:
        return
    shown = list(problems[:limit])
    if len(problems) > limit:
        shown.append(f"… and {len(problems) - limit} more of the same kind.")
    raise MergeError(shown[0] if len(shown) == 1 else "\n  - ".join([f"{len(problems)} problems:", *shown]))
