"""Values within values: what a file holds besides tensors, which may share its parts in any way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_merge.utilities.errors import MergeError

_MOST, _DEEPEST = 1_000_000, 100  # values, levels


def walk(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield something and all that it holds, with their keys in mappings; each container once, however often shared."""
    seen: set[int] = set()
    waiting: list[tuple[Any, Any]] = [(None, content)]
    while waiting:
        key, value = waiting.pop()
        yield key, value
        if _is_container(value) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.items() if isinstance(value, Mapping) else ((None, item) for item in value))


def check_expanded(what: str, content: Any) -> None:
    """Raise a :class:`MergeError` if something holds itself, or is too large or too deep once its parts are not shared.

    A list that holds another list twice, which holds another one twice, and so on, is small in a file and has more
    parts than any computer could visit.

    Args:
        what: What it is, for the message.
        content: Mappings, lists and plain values.
    """
    sizes: dict[int, tuple[int, int]] = {}  # of a container: its values, its levels
    waiting = [(content, False)]
    unfinished: set[int] = set()
    while waiting:
        value, finished = waiting.pop()
        if not _is_container(value) or id(value) in sizes:
            continue
        parts = list(value.values()) if isinstance(value, Mapping) else list(value)
        if not finished:
            if id(value) in unfinished:
                raise MergeError(f"{what} holds a list or mapping that holds itself, which no model needs.")
            unfinished.add(id(value))
            waiting.append((value, True))
            waiting.extend((part, False) for part in parts if _is_container(part) and id(part) not in sizes)
            continue
        inner = [sizes.get(id(part), (1, 0)) if _is_container(part) else (1, 0) for part in parts]
        size, depth = 1 + sum(size for size, _ in inner), 1 + max((depth for _, depth in inner), default=0)
        if size > _MOST or depth > _DEEPEST:
            raise MergeError(
                f"{what} holds lists or mappings of more than {_MOST:,} values or {_DEEPEST} levels besides its "
                "tensors, which no model needs; save its state_dict alone and give that file."
            )
        sizes[id(value)] = size, depth
        unfinished.discard(id(value))


def replace_tensors(content: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """Return the same mappings, lists and values with other tensors. What is shared stays shared.

    Args:
        content: Of a limited size, see :func:`check_expanded`.
        replace: Called with every tensor.
    """
    done: dict[int, Any] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return replace(value)
        if not _is_container(value):
            return value
        if id(value) not in done:
            if isinstance(value, Mapping):
                filled: Any = copy.copy(value)
                filled.update({key: copied(part) for key, part in value.items()})
                done[id(value)] = filled
            elif hasattr(value, "_fields"):
                done[id(value)] = type(value)(*map(copied, value))
            else:
                done[id(value)] = type(value)(map(copied, value))
        return done[id(value)]

    return copied(content)


def _is_container(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple, set, frozenset))
