"""The flow of activations through a module: its steps, and which follow which."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

Kind = Literal["input", "layer", "norm", "attention", "sum", "activation", "plain"]
"""What a step does: ``sum`` adds two activations, ``plain`` moves, pools, scales or shifts by what is no activation."""


@dataclass(eq=False)
class Step:
    """A part that was called (a layer, a normalisation, ``nn.MultiheadAttention``), or an operator outside of them.

    Args:
        index: Its place in the order of steps.
        kind: What it does.
        inputs: The steps that made what it works on.
        path: The part, as ``named_modules`` calls it; None for an operator.
        is_view: Whether it gives the values of its input in another order or shape.
        is_reshape: Whether it gives them in the same order.
        shape: The shape of what it makes.
        axis: Which dimension of that holds the channels, where it is known.
        consumers: The steps that work on what it makes.
        ancestors: Bit i says whether what it makes depends on step i.
    """

    index: int
    kind: Kind
    inputs: tuple[Step, ...]
    path: str | None = None
    is_view: bool = False
    is_reshape: bool = False
    shape: tuple[int, ...] = ()
    axis: int | None = None
    consumers: list[Step] = field(default_factory=list)
    ancestors: int = 0

    def depends_on(self, other: Step) -> bool:
        """Tell whether what this step makes depends on what the other one makes."""
        return bool(self.ancestors >> other.index & 1)

    @property
    def seen_through(self) -> Step:
        """The step that computed the values that this one gives, which may only have moved them."""
        return self.inputs[0].seen_through if self.is_view else self

    def before(self, *through: Kind) -> list[Step]:
        """Find the steps behind which this one stands, seen through some kinds; itself if it is of another kind."""
        return _walk(self, lambda step: step.inputs if step.kind in through else (), lambda step: step.kind in through)

    def after(self, *through: Kind) -> list[Step]:
        """Find the steps that work on what this one makes, seen through steps of some kinds."""
        return _walk(
            self,
            lambda step: step.consumers if step is self or step.kind in through else (),
            lambda step: step is self or step.kind in through,
        )


def _walk(start: Step, to: Callable[[Step], Iterable[Step]], is_seen_through: Callable[[Step], bool]) -> list[Step]:
    seen, stack = {start}, [start]
    while stack:
        for step in to(stack.pop()):
            if step not in seen:
                seen.add(step)
                stack.append(step)
    return sorted((step for step in seen if not is_seen_through(step)), key=lambda step: step.index)


@dataclass(eq=False)
class Call:
    """A part that was called.

    Args:
        path: The part, as ``named_modules`` calls it.
        first: The index that the first step within has.
        inputs: The step that made its first tensor, if there is one.
        shape: The shape of that tensor.
        last: The index after that of the last step within.
        output: The step that made its first output.
        output_shape: The shape of that.
    """

    path: str
    first: int
    inputs: Step | None
    shape: tuple[int, ...]
    last: int = 0
    output: Step | None = None
    output_shape: tuple[int, ...] = ()

    def contains(self, step: Step) -> bool:
        """Tell whether a step happened within."""
        return self.first <= step.index < self.last


@dataclass
class Flow:
    """The record of one forward pass of a module.

    Args:
        module: The module.
        steps: In the order in which they happened; the first one is the input.
        calls: The calls of all parts, in the order in which they ended.
        outputs: The steps that made the outputs.
    """

    module: nn.Module
    steps: list[Step] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    outputs: list[Step] = field(default_factory=list)

    @property
    def layers(self) -> list[tuple[Step, str]]:
        """The linear layers and convolutions that were called, each with its path."""
        return [(step, step.path) for step in self.steps if step.kind == "layer" and step.path is not None]

    def calls_of(self, path: str) -> list[Call]:
        """List the calls of a part."""
        return [call for call in self.calls if call.path == path]

    def ends_at(self, step: Step) -> bool:
        """Tell whether what a step makes is an output, perhaps scaled, shifted, pooled or added up."""
        return any(step in output.before("plain", "sum") for output in self.outputs)
