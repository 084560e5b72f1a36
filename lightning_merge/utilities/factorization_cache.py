"""Keep factorizations, so that a matrix that comes again is not decomposed again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock

from torch import Tensor

Factorization = Callable[[Tensor], tuple[Tensor, ...]]


class Factorizations:
    """Factorizations that merges of the same models have in common, so that each is computed once.

    All ranks share the one factorization of a matrix, from which :func:`lightning_merge.utilities.linalg.svd` takes the
    leading triplets, so the results are those without it, bit for bit. A matrix is known again by its bytes.

    What a merge has not asked for is dropped after it, and nothing is added beyond ``max_bytes``: merges ask for the
    same matrices in the same order, so that what is there longest is asked for next.

    Args:
        max_bytes: How much to keep, in bytes.
    """

    def __init__(self, max_bytes: int = 4 << 30) -> None:
        self.max_bytes = max_bytes
        self._kept: dict[tuple, tuple[Tensor, ...]] = {}
        self._asked: set[tuple] = set()
        self._lock = Lock()

    @property
    def num_bytes(self) -> int:
        """How much is kept, in bytes."""
        return sum(tensor.nbytes for factors in self._kept.values() for tensor in factors)

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Reuse factorizations during one merge."""
        self._asked = set()
        token = _factorizations.set(self)
        try:
            yield
        finally:
            _factorizations.reset(token)
            self._kept = {key: factors for key, factors in self._kept.items() if key in self._asked}

    def get(self, factorize: Factorization, matrices: Tensor) -> tuple[Tensor, ...]:
        """Look up the factorization of ``(…, m, n)``, or compute it. The factors must not be changed in place."""
        content = hashlib.blake2b(matrices.detach().cpu().contiguous().numpy().data).digest()
        key = (factorize, content, matrices.shape, matrices.stride(), matrices.dtype, matrices.device)
        with self._lock:
            self._asked.add(key)
            factors = self._kept.get(key)
        if factors is None:
            factors = factorize(matrices)
            with self._lock:
                if self.num_bytes + sum(tensor.nbytes for tensor in factors) <= self.max_bytes:
                    self._kept[key] = factors
        return factors


_factorizations: ContextVar[Factorizations | None] = ContextVar("factorizations", default=None)


def _factorize(factorize: Factorization, matrices: Tensor) -> tuple[Tensor, ...]:
    """Factorize ``(…, m, n)``, or look it up where :class:`Factorizations` are reused."""
    reused = _factorizations.get()
    return factorize(matrices) if reused is None else reused.get(factorize, matrices)
