"""An element of a model's permutation group: new places for its channels, which leave what it computes unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_merge.align.axes import groups_of, sources
from lightning_merge.align.symmetries import Symmetries


@dataclass(frozen=True)
class Permutation:
    """Permutation of a model's channels: where those of every group are taken from.

    Args:
        symmetries: The groups.
        orders: For each group ``(n,)``: entry i of the result is entry ``order[i]`` of what is permuted, as in
            ``index_select``. For a group within another one ``(outer, n)``: the order in each outer entry of the
            result.
    """

    symmetries: Symmetries
    orders: Mapping[str, Tensor]

    @classmethod
    def identity(cls, symmetries: Symmetries) -> Permutation:
        """Make the permutation that moves nothing."""
        return cls(symmetries, {name: symmetries.identity_order(name) for name in symmetries.groups})

    @classmethod
    def random(cls, symmetries: Symmetries, seed: int = 0) -> Permutation:
        """Draw a permutation uniformly from the whole group."""
        generator = torch.Generator().manual_seed(seed)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64).argsort(dim=-1)

        return cls(symmetries, {name: draw(symmetries.order_shape(name)) for name in symmetries.groups})

    @cached_property
    def _sources(self) -> dict[str, dict[int, Tensor]]:
        """For every parameter the axes along which something moves, and where its entries are taken from."""
        within, moving = self.symmetries.within, {}
        for name, axes in self.symmetries.axes.items():
            every = {dim: sources(axis, self.orders, within) for dim, axis in enumerate(axes) if any(groups_of(axis))}
            moving[name] = {dim: s for dim, s in every.items() if not torch.equal(s, torch.arange(len(s)))}
        return moving

    def apply_to(self, name: str, tensor: Tensor, skip: int | None = None) -> Tensor:
        """Permute one parameter; those that no group orders are returned as they are.

        Args:
            name: The parameter.
            tensor: Its values ``(…)``; the result has their shape.
            skip: An axis that is left as it is.
        """
        for dim, source in self._sources.get(name, {}).items():
            if dim != skip:
                tensor = tensor.index_select(dim, source.to(tensor.device))
        return tensor

    def apply(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Permute a model: new tensors, or the same ones where nothing moves.

        Raises:
            MergeError: If the model has other parameters or shapes.
        """
        self.symmetries.check(weights, getattr(weights, "name", "the model"))
        return {name: self.apply_to(name, weights[name]) for name in weights}

    def inverse(self) -> Permutation:
        """Compute the permutation that undoes this one."""
        within, orders = self.symmetries.within, {}
        for name, order in self.orders.items():
            inverted = order.argsort(dim=-1)
            orders[name] = inverted if name not in within else inverted[self.orders[within[name]].argsort()]
        return Permutation(self.symmetries, orders)

    def then(self, other: Permutation) -> Permutation:
        """Compose two permutations: this one first, then the other."""
        within, orders = self.symmetries.within, {}
        for name, order in self.orders.items():
            inner = order if name not in within else order[other.orders[within[name]]]
            orders[name] = inner.gather(-1, other.orders[name])
        return Permutation(self.symmetries, orders)

    def digest(self) -> str:
        """Compute the sha256 of all orders: the same for the same permutation."""
        digest = hashlib.sha256()
        for name in sorted(self.orders):
            digest.update(f"{name} {tuple(self.orders[name].shape)}\n".encode())
            digest.update(self.orders[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def moved(self) -> float:
        """Compute the share (0 to 1) of all channels that do not stay in their place."""
        count = sum(order.numel() for order in self.orders.values())
        moved = sum(int((order != torch.arange(order.shape[-1])).sum()) for order in self.orders.values())
        return moved / max(count, 1)
