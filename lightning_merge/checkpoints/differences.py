"""Experts that are kept as what they change of a base: LoRA adapters and task vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_merge.checkpoints.weights import Weights
from lightning_merge.utilities.tensors import wide

Factors = tuple[Tensor, Tensor]
"""Left ``(m, r)`` and right ``(r, n)`` factor of a matrix."""


class Change(ABC):
    """A change of one parameter."""

    @abstractmethod
    def delta(self, shape: torch.Size) -> Tensor:
        """Compute the difference ``(…)`` in the parameter's shape, in the precision in which it is known."""

    def factors(self) -> Factors | None:
        """Read the factors ``(m, r)``, ``(r, n)`` of the difference, without a coefficient; None if there are none."""
        return None


@dataclass(frozen=True)
class Dense(Change):
    """A change by a difference that is stored.

    Args:
        stored: Reads the difference, in the parameter's number of entries.
        scaling: Its coefficient.
    """

    stored: Callable[[], Tensor]
    scaling: float = 1.0

    def delta(self, shape: torch.Size) -> Tensor:
        """Read the difference ``(…)``."""
        difference = wide(self.stored()).reshape(shape)
        return difference if self.scaling == 1 else self.scaling * difference.double()


@dataclass(frozen=True)
class Product(Change):
    """A change by ``scaling · B A``.

    Args:
        A: Reads ``(r, in, …)``.
        B: Reads ``(out, r, …)``.
        scaling: The coefficient of the product.
        transposed: Whether the parameter is the transpose of the product (``fan_in_fan_out``, embeddings).
    """

    A: Callable[[], Tensor]
    B: Callable[[], Tensor]
    scaling: float = 1.0
    transposed: bool = False

    def factors(self) -> Factors:
        """Read the factors ``B (m, r)`` and ``A (r, n)``, without the scaling."""
        A, B = wide(self.A()).flatten(1), wide(self.B()).flatten(1)
        return (A.mT, B.mT) if self.transposed else (B, A)

    def delta(self, shape: torch.Size) -> Tensor:
        """Compute the product ``(…)`` in float64."""
        left, right = self.factors()
        return (self.scaling * (left.double() @ right.double())).reshape(shape)


@dataclass(frozen=True)
class Rows(Change):
    """A change of single rows to others (the tokens of an embedding that were trained by themselves).

    Args:
        rows: Reads the new rows ``(k, …)``.
        before: Reads the parameter ``(n, …)`` that is changed.
        indices: Which k rows they replace.
    """

    rows: Callable[[], Tensor]
    before: Callable[[], Tensor]
    indices: Sequence[int]

    def delta(self, shape: torch.Size) -> Tensor:
        """Compute the difference ``(n, …)`` in float64, zero in all other rows."""
        before, rows = self.before().cpu(), torch.tensor(self.indices)
        delta = torch.zeros(shape, dtype=torch.float64)
        delta[rows] = self.rows().double() - before[rows].double()
        return delta


@dataclass(frozen=True)
class Decomposed(Change):
    """A change to magnitude times direction of ``before + scaling · B A`` (DoRA).

    Args:
        product: The change ``scaling · B A`` that gives the directions.
        magnitude: Reads the norms of the outputs, ``(out,)`` in any shape.
        before: Reads the parameter that is changed, ``(out, in, …)``, or its transpose as in the product.
    """

    product: Product
    magnitude: Callable[[], Tensor]
    before: Callable[[], Tensor]

    def delta(self, shape: torch.Size) -> Tensor:
        """Compute the difference ``(…)`` in float64."""
        before = self.before().cpu().double()
        moved = before + self.product.delta(shape)
        inputs = (0,) if self.product.transposed else tuple(range(1, len(shape)))
        norms = torch.linalg.vector_norm(moved, dim=inputs, keepdim=True)
        return self.magnitude().double().reshape(norms.shape) / norms * moved - before


class Difference(Weights):
    """The weights of an expert that is kept as a difference to a base, computed when they are asked for.

    Changed parameters are at least float32, so that small changes are not rounded away.

    Args:
        name: What to call this expert in messages.
        stored: What the expert's file holds.
        origin: The base.
        changes: How parameters of the base are changed, by their names.
        own: Where the file holds parameters that do not come from the base: ``{parameter: key}``.
        missing: The base's parameters that the expert lacks.
        tied: Names that share a tensor with another name: ``{alias: name}``.
    """

    origin: Weights

    def __init__(
        self,
        name: str,
        stored: Weights,
        origin: Weights,
        changes: Mapping[str, Change],
        own: Mapping[str, str],
        missing: Sequence[str] = (),
        tied: Mapping[str, str] | None = None,
    ) -> None:
        self.origin, self.stored, self.changes, self.own = origin, stored, changes, own
        self.low_rank = any(isinstance(change, Product) for change in changes.values())
        tied = tied or {}
        owners = {key: tied.get(key, key) for key in (*origin, *own, *tied) if key not in missing}
        meta = {key: origin.meta[key] for key in owners if key in origin}
        meta |= {key: stored.meta[place] for key, place in own.items()}
        meta |= {key: wide(meta[key]) for key in changes}
        super().__init__(
            name,
            readers={key: partial(self._read, owner) for key, owner in owners.items()},
            meta={key: meta[owner] for key, owner in owners.items()},
            path=stored.path,
            header=stored.header,
            tied=tied,
            inputs=stored.inputs,
        )

    def _read(self, name: str) -> Tensor:
        weight = self.stored[self.own[name]] if name in self.own else self.origin[name]
        if name not in self.changes:
            return weight
        weight = wide(weight)
        delta = self.changes[name].delta(weight.shape).to(weight.device)
        return (weight.double() + delta).to(weight.dtype)

    def delta(self, name: str, base: Tensor) -> Tensor | None:
        """Compute the difference of a parameter to a base's ``(…)``, as it is stored; None if it is not known.

        A product of factors has their rank to the last digit. A difference of float32 weights would have full rank, by
        rounding errors that methods which flatten the spectrum take for directions like any other.
        """
        name = self.tied.get(name, name)
        if name not in self.changes or not self._is_over(name, base):
            return None
        return self.changes[name].delta(base.shape).to(base.device)

    def factors(self, name: str, base: Tensor) -> list[Factors] | None:
        """Read the factors ``B (m, r)`` and ``A (r, n)`` of the difference of a parameter to a base's ``(…)``.

        Returns:
            No pair where the expert leaves the parameter alone; None where no factors are known.
        """
        name = self.tied.get(name, name)
        if not self._is_over(name, base):
            return None
        factors = self.changes[name].factors() if name in self.changes else ()
        return None if factors is None else [factors] if factors else []

    def _is_over(self, name: str, base: Tensor) -> bool:
        """Tell whether a parameter is a difference to these values (not replaced, nor opened over another base)."""
        return name not in self.own and torch.equal(wide(self.origin[name]).to(base.device), base)
