"""The plan of a merge: what it would do, as values and in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_merge.merging.inventory import Inventory
from lightning_merge.utilities.grid import Cell, Grid
from lightning_merge.utilities.terminal import visible

_SHOWN = 6
"""How many names of a list are shown."""


@dataclass(frozen=True)
class Costs:
    """Estimated cost of a merge.

    Args:
        read: Bytes to read, over all passes.
        passes: How often the files are read.
        write: Bytes to write.
        memory: Bytes in memory at the peak, besides the interpreter and torch.
        seconds: Duration of the merge.
        open_ended: Whether ``read``, ``memory`` and ``seconds`` are lower bounds, as the method looks at the whole
            model before it merges.
    """

    read: int
    passes: int
    write: int
    memory: int
    seconds: float
    open_ended: bool


@dataclass(frozen=True)
class Plan:
    """Plan of a merge, which can be done if there are no ``problems``.

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
        """Convert the plan to plain values, for programs."""
        return asdict(self)

    def text(self) -> str:
        """Write the plan as Markdown that reads well in a terminal."""
        names = ", ".join(map(visible, self.experts))
        experts = f"{len(self.experts)} expert{'' if len(self.experts) == 1 else 's'} ({names})"
        blocks = [f"# Plan: {self.method['class_path']} of {experts}", self._headline()]
        if self.inventory is not None:
            blocks += [
                Grid(("parameters", "tensors", "values"), list(self._rows(self.inventory))).markdown(),
                *self._details(self.inventory),
            ]
        if self.costs is not None:
            blocks.append(Grid(("it costs about", ""), list(_cost_rows(self.costs, self.output))).markdown())
        return "\n\n".join([*blocks, *map(visible, self.notes)])

    def _headline(self) -> str:
        if not self.problems:
            return "Nothing stands in its way."
        count = "One thing stands" if len(self.problems) == 1 else f"{len(self.problems)} things stand"
        return "\n".join([f"**{count} in its way:**\n", *(f"- {visible(problem)}" for problem in self.problems)])

    def _rows(self, inventory: Inventory) -> Iterator[list[Cell]]:
        """Yield a row for each thing that happens to parameters."""
        counts = {
            "merged": ("merged", len(inventory.merged)),
            "matrices": ("of these, matrices", sum(count for count, _, _ in self.matrices)),
            "averaged": ("running statistics, averaged", len(inventory.averaged)),
            "copied": ("copied from the base", len(inventory.copied)),
        }
        for key, (what, count) in counts.items():
            values = self.values.get(key, 0)
            yield [Cell(what), Cell(str(count), count), Cell(_count(values), values)]
        if magnitudes := len(inventory.magnitudes):
            yield [Cell("magnitudes of merged weights (weight_norm)"), Cell(str(magnitudes), magnitudes), Cell("")]
        tied = len(inventory.tied)
        yield [Cell("tied to another name"), Cell(str(tied), tied), Cell("")]

    def _details(self, inventory: Inventory) -> Iterator[str]:
        if self.matrices:
            shapes = ", ".join(f"{count} x ({m}, {n})" for count, m, n in self.matrices)
            yield f"Matrices: {shapes}."
        for expert, prefix in self.renamed.items():
            yield visible(f"Names of {expert}, matched by their prefix: `{prefix}`.")
        for names in dict.fromkeys(names for names in inventory.private.values() if names):
            owners = [expert for expert, private in inventory.private.items() if private == names]
            yield visible(f"Left out, and only in what `for_task` gives for {' or '.join(owners)}: {_some(names)}.")
        if inventory.tied:
            yield visible(f"Tied: {_some([f'{alias} = {name}' for alias, name in inventory.tied.items()])}.")


def _cost_rows(costs: Costs, output: str | None) -> Iterator[list[Cell]]:
    """Yield a row for each kind of cost; a path is shown as it is typed."""
    least = "at least " if costs.open_ended else ""
    passes = "once" if costs.passes == 1 else f"{costs.passes} times"
    written = f"{size(costs.write)} to {visible(output)}" if output else "nothing"
    yield [Cell("to read"), Cell(f"{least}{size(costs.read)}: every file {passes}")]
    yield [Cell("to write"), Cell(written, markdown=written)]
    yield [Cell("memory"), Cell(f"{least}{size(costs.memory)} at the peak, besides Python and torch")]
    yield [Cell("time"), Cell(f"{least}{_duration(costs.seconds)}; more if the disk is slow")]


def size(number: float) -> str:
    """Write a number of bytes in words: ``343 MB``."""
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
    """Write a number of seconds in words, with two digits: more are not known."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.2g} {name}"
    return f"{seconds:.2g} s" if seconds >= 1 else "a second"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
