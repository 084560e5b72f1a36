"""The one error that this package raises about its inputs: sentences that a user can act on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_merge.utilities.terminal import visible


class MergeError(ValueError):
    """An error about inputs that cannot work; the message says what, where, and what to do.

    Args:
        message: One sentence, or the lines of a list of them.
        problems: The sentences of a list, all of them; by default the message is the only one.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(visible(message, keep="\n" if problems else ""))
        self.problems = tuple(map(visible, problems)) or self.args

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.problems)


def raise_all(problems: Sequence[str], *, limit: int = 20) -> None:
    """Raise one :class:`MergeError` that lists every problem found, or return if there is none."""
    if not problems:
        return
    shown = [visible(problem) for problem in problems[:limit]]
    if len(problems) > limit:
        shown.append(f"… and {len(problems) - limit} more of the same kind.")
    raise MergeError(shown[0] if len(shown) == 1 else "\n  - ".join([f"{len(problems)} problems:", *shown]), problems)


def problems_of(check: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    """Call a check and list the problems that it raises instead of raising them."""
    try:
        check(*args, **kwargs)
    except MergeError as error:
        return list(error.problems)
    return []
