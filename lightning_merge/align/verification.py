"""Check that permutations leave a module's outputs unchanged."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_merge.align.axes import Axis, Fixed, Free, Product, Sum
from lightning_merge.align.nesting import has_group
from lightning_merge.align.permutation import Permutation
from lightning_merge.align.symmetries import Symmetries
from lightning_merge.utilities.errors import MergeError

FAILED = "failed verification"
EXACT, ROUNDED = 1e-8, 1e-4
"""The largest change of an output, relative to the largest output, in double precision and below."""


def verified(symmetries: Symmetries, module: nn.Module, inputs: tuple[Any, ...], seed: int = 0) -> Symmetries:
    """Leave out the groups that change what a module computes.

    Args:
        symmetries: The groups that were found.
        module: A module of one's own in evaluation mode; its parameters are overwritten.
        inputs: What it is called with; floating-point ones are drawn anew.
        seed: The seed of the parameters, inputs and permutations.

    Raises:
        MergeError: If the outputs are not finite.
    """
    trial = Trial(module, inputs, seed)
    culprits = trial.culprits(symmetries, list(symmetries.groups))
    if not culprits:
        return symmetries
    kept = without(symmetries, culprits)
    return replace(kept, fixed={**kept.fixed, **{f"{FAILED}: {name}": 1 for name in culprits}})


class Trial:
    """A module with random parameters, in double precision if it supports that, and what it computes."""

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...], seed: int = 0) -> None:
        self.module, self.seed = module, seed
        randomize(module, seed)
        for dtype in (torch.float64, torch.float32):
            self.module.to(dtype)
            self.inputs = _drawn(inputs, dtype, seed)
            try:
                with _Precision() as precision:
                    self.outputs = self.run(module.state_dict())
            except RuntimeError:
                if dtype is torch.float32:
                    raise
            else:
                break
        self.tolerance = ROUNDED if precision.rounded else EXACT
        finite = all(bool(out.isfinite().all()) for out in self.outputs)
        self.scale = max((float(out.abs().max()) for out in self.outputs if out.numel()), default=0.0) if finite else 0
        if self.scale == 0:
            raise MergeError(
                "The permutation groups cannot be verified, since the module's outputs on random inputs are zero or "
                "not finite; give other example inputs, or verify=False."
            )

    def run(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the module with other parameters ``(…)``; return its outputs ``(…)`` in float64."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            outputs = functional_call(self.module, dict(weights), self.inputs, tie_weights=False)
        return [out.double() for out in pytree.tree_leaves(outputs) if isinstance(out, Tensor)]

    def error(self, permutation: Permutation) -> float:
        """Measure the largest change of an output that a permutation makes, relative to the largest output."""
        permuted = self.run(permutation.apply(self.module.state_dict()))
        changes = [(new - old).abs().max() for new, old in zip(permuted, self.outputs, strict=True) if new.numel()]
        return float(torch.stack(changes).max()) / self.scale

    def culprits(self, symmetries: Symmetries, names: list[str]) -> list[str]:
        """Find the groups among some that change what is computed, by bisection."""
        drawn = Permutation.random(symmetries, self.seed)
        orders = {
            name: drawn.orders[name] if name in names else symmetries.identity_order(name) for name in drawn.orders
        }
        if not names or self.error(Permutation(symmetries, orders)) <= self.tolerance:
            return []
        half = len(names) // 2
        fewer = [name for part in (names[:half], names[half:]) if half for name in self.culprits(symmetries, part)]
        return fewer or names


class _Precision(TorchDispatchMode):
    """Dispatch mode that notes whether anything has less than double precision: some layers convert their inputs."""

    rounded = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        self.rounded |= any(leaf.is_floating_point() and leaf.dtype != torch.float64 for leaf in tensors)
        return out


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Draw those parameters and statistics anew that would hide a wrong permutation: those that are constant."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: torch.Size, low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point() or tensor.numel() < 2 or bool((tensor != tensor.flatten()[0]).any()):
                continue
            if name.endswith("running_mean"):
                tensor.copy_(draw(tensor.shape, -0.5, 0.5))
            elif isinstance(tensor, nn.Parameter) or name.endswith("running_var"):
                zero = bool(tensor.flatten()[0] == 0)
                width = max(tensor[0].numel(), 1) ** -0.5 if tensor.dim() > 1 else 0.3
                tensor.copy_(draw(tensor.shape, -width, width) if zero else draw(tensor.shape, 0.5, 1.5))


def _drawn(inputs: tuple[Any, ...], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device, dtype)

    return pytree.tree_map_only(Tensor, draw, inputs)


def without(symmetries: Symmetries, names: Collection[str]) -> Symmetries:
    """Fix some groups; those within them get one order for all."""

    def fix(axis: Axis) -> Axis:
        if isinstance(axis, Free):
            return Fixed(axis.size) if axis.group in names else axis
        if isinstance(axis, Product):
            return Product(tuple(map(fix, axis.factors)))
        return Sum(tuple(map(fix, axis.parts))) if isinstance(axis, Sum) else axis

    def table(axes: Mapping[str, tuple[Axis, ...]]) -> dict[str, tuple[Axis, ...]]:
        remaining = {name: tuple(map(fix, along)) for name, along in axes.items()}
        return {name: along for name, along in remaining.items() if has_group(along)}

    axes = table(symmetries.axes)
    return replace(
        symmetries,
        groups={
            name: replace(group, within=None if group.within in names else group.within)
            for name, group in symmetries.groups.items()
            if name not in names
        },
        axes=axes,
        features=table(symmetries.features),
        statistics=symmetries.statistics & set(axes),
    )
