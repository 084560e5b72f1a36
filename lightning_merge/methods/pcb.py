"""PCB (Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024, arXiv 2410.02396)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_choice, check_range
from lightning_merge.methods.base.task_vectors import TaskVectors
from lightning_merge.methods.ties import per_expert
from lightning_merge.utilities.order_statistics import kth_magnitude, kth_value, sample
from lightning_merge.utilities.tiling import pieces

Variant = Literal["es", "vision", "readme"]


class Bounds(NamedTuple):
    """Lowest and highest value of every expert's whole model after clamping: ``(T,), (T,)``."""

    low: Tensor
    high: Tensor

    def clamp(self, values: Tensor) -> Tensor:
        """Clamp the values of every expert: ``(T, …) -> (T, …)``."""
        return torch.minimum(values.maximum(per_expert(self.low, values)), per_expert(self.high, values))

    def normalize(self, values: Tensor) -> Tensor:
        """Clamp, and map the bounds to 0 and 1 (everything to 0 where they are equal): ``(T, …) -> (T, …)``."""
        low, width = per_expert(self.low, values), per_expert(self.high - self.low, values)
        normalized = (self.clamp(values) - low).div_(width)
        return normalized if (width > 0).all() else torch.where(width > 0, normalized, 0)


def competition(deltas: Tensor, magnitudes: Bounds, variant: Variant = "es") -> Tensor:
    """Score every entry within its expert (by magnitude) and against the other experts: ``(T, …) -> (T, …)``.

    Args:
        deltas: ``(T, …)``.
        magnitudes: The bounds of ``|deltas|``.
        variant: What an entry x of expert i is held against, with s the normalised magnitude with x's sign:
            ``es`` Σ_j tanh(s_i · s_j); ``vision`` tanh(x_i · Σ_j s_j); ``readme`` tanh(x_i · Σ_j x_j).

    Returns:
        ``(T, …)``.
    """
    normalized = magnitudes.normalize(deltas.abs())
    intra = (len(deltas) * normalized.square()).exp()
    signed = deltas.sign() * normalized
    if variant == "es":
        inter = torch.stack([pairs.sum(dim=0) for pairs in _pairwise_tanh(signed)])
    else:
        inter = (deltas * (signed if variant == "vision" else deltas).sum(dim=0)).tanh()
    return intra * inter


def _pairwise_tanh(signed: Tensor) -> Tensor:
    """Compute ``tanh(s_i · s_j)`` for every pair, each once: ``(T, …) -> (T, T, …)``."""
    T = len(signed)
    pairs = signed.new_empty(T, *signed.shape)
    for i in range(T):
        pairs[i, i:] = (signed[i] * signed[i:]).tanh_()
        pairs[i + 1 :, i] = pairs[i, i + 1 :]
    return pairs


def pcb(deltas: Tensor, magnitudes: Bounds, weights: Tensor) -> Tensor:
    """Average the clamped task tensors by their weights: ``(T, …), (T, …) -> (…)``."""
    clamped = deltas.sign() * magnitudes.clamp(deltas.abs())
    return (clamped * weights).sum(dim=0) / weights.sum(dim=0).clamp(min=1e-12)


class Survey(NamedTuple):
    """The bounds of the magnitudes, and those of the scores of the competition."""

    magnitudes: Bounds
    scores: Bounds


@dataclass(frozen=True)
class PCB(MergeMethod):
    """Parameter competition balancing: entries that win within their expert and against the others are averaged.

    Quantiles and ranges are those of an expert's whole model. The official repository holds three versions that
    differ: ``es`` (``pcb_ES.py``, the one that SCORE's authors use), ``vision`` (``pcb.py``, run with scale 1.2) and
    ``readme`` (``pcb-merging.py``, with ratio 0.1 and clamp 0.0001).

    Args:
        ratio: Share of every expert's entries that get a weight, by score; in (0, 1].
        clamp: Share of the smallest and of the largest magnitudes that are clamped before scoring; in [0, 0.5).
        variant: The official version.
        scale: Scaling coefficient; 1 in SCORE's comparison, 1.2 or a search per task in the official code.
    """

    paper: ClassVar[Paper] = Paper("Du et al.", "NeurIPS", 2024, "2410.02396")
    formula: ClassVar[str] = (
        "τ = Σ_t w_t ∘ Δ_t / Σ_t w_t; w_t = top(exp(T s_t²) ∘ Σ_j tanh(s_t ∘ s_j)); s_t: normalised Δ_t"
    )
    entrywise: ClassVar[bool] = True
    reads_twice: ClassVar[bool] = True

    ratio: float = 0.05
    clamp: float = 0.01
    variant: Variant = "es"

    def __post_init__(self) -> None:
        check_range(self, "ratio", 0, 1, open_low=True)
        check_range(self, "clamp", 0, 0.5, open_high=True)
        check_choice(self, "variant", ("es", "vision", "readme"))

    def survey(self, task_vectors: TaskVectors) -> Survey:
        """Find the bounds of every expert's magnitudes, then those of its scores."""

        def deltas() -> Iterator[Tensor]:
            return (piece for _, chunk in task_vectors.stream() for piece in pieces(chunk))

        def scores() -> Iterator[Tensor]:
            return (competition(piece, magnitudes, self.variant) for piece in deltas())

        drawn = sample(deltas)
        total = drawn.total
        lowest, highest = int(total * self.clamp) + 1, int(total * (1 - self.clamp) - 1) + 1
        magnitudes = Bounds(*kth_magnitude(deltas, [lowest, highest], drawn))
        drawn = drawn._replace(values=competition(drawn.values, magnitudes, self.variant))
        smallest = min(int(total * (1 - self.ratio)) + 1, total)
        return Survey(magnitudes, Bounds(*kth_value(scores, [smallest, total], drawn)))

    def tensor(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter: ``(T, …) -> (…)``, see :func:`pcb`."""
        survey: Survey = context.survey
        weights = survey.scores.normalize(competition(deltas, survey.magnitudes, self.variant))
        return pcb(deltas, survey.magnitudes, weights)
