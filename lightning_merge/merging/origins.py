"""Where experts come from: was one of them fine-tuned from another model than the base?

Such a stranger has the base's names and shapes, and merging it gives nothing. An expert ``θ = θ₀ + τ`` is told by

- the length of its task vector in relation to the base, ``‖τ‖ / ‖θ₀‖``: 0.1 or less after a fine-tune, and ``√2`` for
  a model of the same norm that has nothing to do with the base;
- what is left of the base in it, ``⟨θ, θ₀⟩ / ‖θ₀‖²``: 1 after a fine-tune, and 0 for a stranger.

Both are taken over matrices and kernels alone, whose entries have no preferred sign: scales of norms are near one in
all models. Those that are zero in the base (a new head) are left out.

Only the second one decides. The length does not tell: small networks that are trained for long from a random base go
7 times as far as it is long, and an expert is as far as ``√(N - 1)`` from the mean of its N foundations. What is left
of the base was 0.8 to 3.3 in all of these, and 0.4 under a weight decay that nearly forgets where it began (5e-3, for
40 epochs). Of strangers (pretrained against random weights, another seed, permuted channels) it was below 0.01; by
chance it lies within ``3 ‖τ‖ / (‖θ₀‖ √n)`` of zero, for n entries, so that no model of a few hundred entries is
refused.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from lightning_merge.checkpoints import Weights
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.inner_products import cosines, inner_products, norms
from lightning_merge.utilities.workers import one_thread

FEW_LEFT = 0.5
"""An expert in which less than this is left of the base is worth a warning."""
NOTHING_LEFT = 0.25
"""One in which certainly less than this is left is refused."""
ONE_ORIGIN = 0.9
"""Strangers whose task vectors have this cosine come from one other model."""
_DRAWN, _PLACES, _ENOUGH = 6, 1 << 12, 1 << 14
"""So many matrices are drawn; of the smallest of them so many entries of each are looked at, until there are enough.
That is enough to be sure, and costs little beside a merge, which reads every file three times.
"""


@dataclass(frozen=True)
class Origins:
    """How T experts lie to the base.

    Args:
        experts: Their names.
        products: The inner products of the base, first, and the experts' task vectors, ``(1 + T, 1 + T)``.
        entries: The number of entries that were looked at.
    """

    experts: Sequence[str]
    products: Tensor
    entries: int

    @property
    def lengths(self) -> Tensor:
        """The length of every task vector in relation to the base, ``‖τ‖ / ‖θ₀‖``: ``(T,)``."""
        lengths = norms(self.products)
        return lengths[1:] / lengths[0]

    @property
    def left(self) -> Tensor:
        """What is left of the base in every expert, ``⟨θ, θ₀⟩ / ‖θ₀‖²``: ``(T,)``."""
        return 1 + self.products[0, 1:] / self.products[0, 0]

    @property
    def cosines(self) -> Tensor:
        """The cosines between the task vectors ``(T, T)``."""
        return cosines(self.products[1:, 1:])

    def only(self, expert: str) -> Origins:
        """Return how one expert lies to the base."""
        rows = [0, 1 + list(self.experts).index(expert)]
        return Origins([expert], self.products[rows][:, rows], self.entries)

    def summary(self) -> str | None:
        """Say how long the task vectors are, and how they lie to each other; None if the base has no matrices."""
        if not self.entries:
            return None
        cosines = _pairs(self.cosines)
        between = f"; the cosines between them are {_range(cosines)}" if len(cosines) else ""
        return f"Task vectors are {_range(self.lengths)} times as long as the base{between}."

    def problem(self) -> str | None:
        """Say which experts certainly do not come from the base, and what to do; None if there are none."""
        chance = 3 * self.lengths / max(self.entries, 1) ** 0.5
        return self._sentence(self.left + chance < NOTHING_LEFT, "do not come from this base")

    def warning(self) -> str | None:
        """Say which experts may not come from the base; None if all of them look as if they did."""
        return self._sentence(self.left < FEW_LEFT, "hardly look as if they came from this base")

    def _sentence(self, told: Tensor, what: str) -> str | None:
        strangers = told.nonzero().flatten().tolist()
        if not strangers:
            return None
        numbers = ", ".join(
            f"{self.experts[i]} (task vector {self.lengths[i]:.2f} times as long as the base, "
            f"{100 * self.left[i].clamp(min=0):.0f} % of the base left)"
            for i in strangers
        )
        return (
            f"These experts {what}: {numbers}. After a fine-tune it is about 0.1 times, and nearly all is left. "
            f"{self._remedy(strangers)}, or, if it is right all the same, say allow_strangers: true."
        )

    def _remedy(self, strangers: Sequence[int]) -> str:
        align = "put its channels into the others' order first with `align`"
        if len(strangers) == 1:
            return f"Give the base that it was fine-tuned from, {align}"
        pairs = _pairs(self.cosines[strangers][:, strangers])
        if not len(pairs):
            return f"Give the base that they were fine-tuned from, {align.replace('its', 'their')}"
        if float(pairs.min()) > ONE_ORIGIN:
            return f"Their task vectors have cosines of {_range(pairs)}: they come from one other base. Give that one"
        return (
            f"Their task vectors have cosines of {_range(pairs)}; give the base that they were fine-tuned from, or, if "
            f"there are several, put their channels into one order first with `align`"
        )


def _pairs(cosines: Tensor) -> Tensor:
    """Return the cosines ``(T, T)`` of the pairs of task vectors that are not zero, each pair once."""
    pairs = cosines[tuple(torch.triu_indices(len(cosines), len(cosines), 1))]
    return pairs[pairs.isfinite()]


def _range(values: Tensor) -> str:
    low, high = f"{float(values.min()):.2f}", f"{float(values.max()):.2f}"
    return low if low == high else f"{low} to {high}"


def check_origins(
    base: Weights, experts: Mapping[str, Weights], names: Sequence[str], allow_strangers: bool = False
) -> Origins:
    """Measure how the experts lie to the base; refuse those that do not come from it, and warn of those that may not.

    Args:
        base: The base.
        experts: The experts by name.
        names: The parameters that are merged.
        allow_strangers: Neither refuse nor warn.

    Raises:
        MergeError: If an expert certainly does not come from this base.
    """
    origins = measure_origins(base, experts, names)
    if not allow_strangers:
        if (problem := origins.problem()) is not None:
            raise MergeError(problem)
        if (warning := origins.warning()) is not None:
            warnings.warn(warning, stacklevel=2)
    return origins


def measure_origins(base: Weights, experts: Mapping[str, Weights], names: Sequence[str]) -> Origins:
    """Measure how the experts lie to the base, in a sample of entries that is the same for the same models.

    Args:
        base: The base.
        experts: The experts by name.
        names: The parameters that are merged.
    """
    chosen = _sample({name: base.meta[name].numel() for name in names if base.meta[name].ndim > 1})
    differences = [ExpertTaskVectors(base, [expert], chosen) for expert in experts.values()]
    entries, draw = 0, torch.Generator().manual_seed(0)
    looked_at = [torch.zeros(1 + len(experts), 0, dtype=torch.float64)]
    with one_thread():
        for name in chosen:
            origin = base[name]
            size = origin.numel()
            places = torch.randint(size, (_PLACES,), generator=draw) if size > _PLACES else torch.arange(size)
            vectors = chain([origin], (difference.stack(name, origin)[0] for difference in differences))
            some = [vector.flatten()[places.to(vector.device)].cpu().double() for vector in vectors]
            if bool(some[0].any()):
                looked_at.append(torch.stack(some) * (size / len(places)) ** 0.5)
                entries += len(places)
        products = inner_products(torch.cat(looked_at, dim=1))
    return Origins(list(experts), products, entries)


def _sample(sizes: Mapping[str, int]) -> list[str]:
    """Choose a few matrices from all over the model, by their numbers of entries."""
    drawn = random.Random(0).sample(list(sizes), min(len(sizes), _DRAWN))
    chosen: list[str] = []
    for name in sorted(drawn, key=sizes.__getitem__):
        if sum(min(sizes[other], _PLACES) for other in chosen) < _ENOUGH:
            chosen.append(name)
    return chosen
