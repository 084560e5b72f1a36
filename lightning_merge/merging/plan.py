"""What a merge would do, as values and in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_merge.merging.inventory import Inventory

_NUMBER = re.compile(r"([\d.]+( [kMB])?)?")
_SHOWN = 6
"""How many names of a list are shown."""


@dataclass(frozen=True)
class Costs:
    """What a merge costs, about.

    Args:
        read: Bytes to read, over all passes.
        passes: How often the files are read.
        write: Bytes to write.
        memory: Bytes in memory at the peak, beside the interpreter and torch.
        seconds: How long it takes.
        open_ended: Whether ``read``, ``memory`` and ``seconds`` are the least, as the method looks at the whole model
            before it merges.
    """

    read: int
    passes: int
    write: int
    memory: int
    seconds: float
    open_ended: bool


@dataclass(frozen=True)
class Plan:
    """What a merge would do. It can be done if there are no ``problems``.

    Args:
        method: The method, as class path and arguments.
        experts: The names of the experts.
        output: Where the merged model would be written; None for memory.
        problems: Everything that stands in the way, a sentence each.
        inventory: What happens to every parameter; None if the base cannot be opened.
        values: The number of entries of what is ``merged``, of the ``matrices`` in it, ``averaged``, and ``copied``.
        matrices: Which merged parameters count as matrices: ``(count, m, n)``, the most entries first.
        renamed: By expert, how its names become the base's: ``model.* -> *``.
        costs: What it costs; None where something stands in the way.
        notes: What cannot be known from headers.
    """

    method: dict[str, Any]
    experts: tuple[str, ...]
    output: str | None
    problems: tuple[str, ...]
    inventory: Inventory | None = None
    values: Mapping[str, int] = field(default_factory=dict)
    matrices: tuple[tuple[int, int, int], ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    costs: Costs | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for programs."""
        return asdict(self)

    def text(self) -> str:
        """All of it in words, as Markdown that reads well in a terminal."""
        experts = f"{len(self.experts)} expert{'' if len(self.experts) == 1 else 's'} ({', '.join(self.experts)})"
        blocks = [f"# Plan: {self.method['class_path']} of {experts}", self._headline()]
        if self.inventory is not None:
            blocks += [_table(("parameters", "tensors", "values"), self._rows()), *self._details(self.inventory)]
        if self.costs is not None:
            blocks.append(_table(("it costs about", ""), _cost_rows(self.costs, self.output)))
        return "\n\n".join([*blocks, *self.notes])

    def _headline(self) -> str:
        if not self.problems:
            return "Nothing stands in its way."
        count = "One thing stands" if len(self.problems) == 1 else f"{len(self.problems)} things stand"
        return "\n".join([f"**{count} in its way:**\n", *(f"- {problem}" for problem in self.problems)])

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        found = self.inventory
        counts = {
            "merged": ("merged", len(found.merged)),
            "matrices": ("of these, matrices", sum(count for count, _, _ in self.matrices)),
            "averaged": ("running statistics, averaged", len(found.averaged)),
            "copied": ("copied from the base", len(found.copied)),
        }
        for key, (what, count) in counts.items():
            yield what, str(count), _count(self.values.get(key, 0))
        yield "tied to another name", str(len(found.tied)), ""

    def _details(self, inventory: Inventory) -> Iterator[str]:
        if self.matrices:
            shapes = ", ".join(f"{count} x ({m}, {n})" for count, m, n in self.matrices)
            yield f"Matrices: {shapes}."
        for expert, prefix in self.renamed.items():
            yield f"Names of {expert}, matched by their prefix: `{prefix}`."
        for names in dict.fromkeys(names for names in inventory.private.values() if names):
            owners = [expert for expert, own in inventory.private.items() if own == names]
            yield f"Left out, and only in what `for_task` gives for {' or '.join(owners)}: {_some(names)}."
        if inventory.tied:
            yield f"Tied: {_some([f'{alias} = {name}' for alias, name in inventory.tied.items()])}."


def _cost_rows(costs: Costs, output: str | None) -> Iterator[tuple[str, str]]:
    least = "at least " if costs.open_ended else ""
    passes = "once" if costs.passes == 1 else f"{costs.passes} times"
    yield "to read", f"{least}{size(costs.read)}: every file {passes}"
    yield "to write", f"{size(costs.write)} to {output}" if output else "nothing"
    yield "memory", f"{least}{size(costs.memory)} at the peak, beside Python and torch"
    yield "time", f"{least}{_duration(costs.seconds)}; more if the disk is slow"


def _table(header: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A Markdown table; numbers stand at the right."""
    lines = [tuple(header), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [all(_NUMBER.fullmatch(cell) for cell in column) for column in zip(*lines[1:], strict=True)]

    def line(cells: Sequence[str]) -> str:
        columns = zip(cells, widths, right, strict=True)
        return f"| {' | '.join(cell.rjust(width) if at else cell.ljust(width) for cell, width, at in columns)} |"

    rule = [f"{'-' * (width - 1)}{':' if at else '-'}" for width, at in zip(widths, right, strict=True)]
    return "\n".join([line(lines[0]), line(rule), *map(line, lines[1:])])


def size(number: float) -> str:
    """A number of bytes in words: ``343 MB``."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f} bytes"


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return str(number)


def _duration(seconds: float) -> str:
    """Two digits are more than is known."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.2g} {name}"
    return f"{seconds:.2g} s" if seconds >= 1 else "a second"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
