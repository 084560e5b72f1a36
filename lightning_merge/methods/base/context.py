"""The context of a rule: what it knows about a parameter besides its task vectors."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.utilities.tensors import is_finite


@dataclass(frozen=True)
class Context:
    """The context of a rule: what it may know besides the task vectors of the one parameter that it merges.

    Args:
        name: The name of the parameter.
        base: The base's parameter ``(…)``, in the precision of the task vectors.
        matrices: Which parameters count as matrices.
        seed: The seed of this parameter, derived from the seed of the merge and the parameter's name.
        survey: What the method's own :meth:`lightning_merge.MergeMethod.survey` returned for this model.
        statistics: What the experts' data say about the parameter, by kind (``fisher``, ``gram``, ``gram_out``),
            stacked over the experts ``(T, …)``; see :mod:`lightning_merge.checkpoints.statistics_files`.
    """

    name: str = ""
    base: Tensor = None  # type: ignore[assignment]  # a merge always gives it
    matrices: Matrices = Matrices()  # noqa: RUF009, a frozen dataclass
    seed: int = 0
    survey: Any = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def finite_base(self) -> Tensor:
        """The base's parameter ``(…)``, with zeros where it is infinite (an attention mask, in which nothing moves)."""
        return self.base if is_finite(self.base) else self.base.masked_fill(self.base.isinf(), 0)

    def generator(self, stream: str = "") -> torch.Generator:
        """Make a random generator (on the CPU) that starts from this parameter's seed.

        Methods that may stand one inside another name a stream each, so that their draws are independent.
        """
        return torch.Generator().manual_seed(self.seed ^ zlib.crc32(stream.encode()))

    def with_survey(self, survey: Any) -> Context:
        """Copy the context with another survey, which a wrapper hands to the method inside."""
        return replace(self, survey=survey)
