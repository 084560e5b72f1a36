"""Non-local merging: experts of several foundations in one order of channels, around one common initialisation.

Sharma, Roy, Dziugaite, "The Non-Local Model Merging Problem", arXiv 2410.12766: with foundations A and B and a
permutation P that puts the channels of B where those of A are,

    theta_init = (A + P(B)) / 2,    tau_t = P(theta_t) - theta_init  (without P for the experts of A),

and any merging method goes on from there. The permutation is found once, on the foundations, never on the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lightning_merge.align.permutation import Permutation
from lightning_merge.checkpoints import Source, Weights, match_names, open_expert, open_weights
from lightning_merge.checkpoints.views import Mean, Renamed, own_names
from lightning_merge.utilities.errors import raise_all

Match = Callable[[Mapping[str, Weights]], Mapping[str, Permutation]]
"""Function that finds the permutation of every foundation, by its name."""


class Permuted(Weights):
    """A model in another order of its channels, permuted when it is read.

    Its values differ from the model's, so it has a digest of its own, and the model's statistics are not its own.

    Args:
        original: The model.
        permutation: How its channels are ordered.
    """

    def __init__(self, original: Weights, permutation: Permutation) -> None:
        permutation.symmetries.check(original, original.name)
        super().__init__(
            original.name,
            {name: partial(self._permuted, name) for name in original},
            original.meta,
            header=original.header,
            tied=original.tied,
            inputs=original.inputs,
        )
        self.original, self.permutation = original, permutation

    def _permuted(self, name: str) -> Tensor:
        return self.permutation.apply_to(name, self.original[name])

    def provenance(self) -> dict[str, Any]:
        """Record where the model is from, and through which permutation it is read."""
        return self.original.provenance() | {"permutation": self.permutation.digest()}


@dataclass(frozen=True)
class Aligned:
    """Experts in one order of channels, ready for :func:`lightning_merge.merge`.

    Args:
        base: The common initialisation, the mean of the foundations in that order.
        experts: The experts by name, in that order.
        foundations: The foundations by name, in that order.
        permutations: How the channels of each foundation were ordered.
    """

    base: Weights
    experts: dict[str, Weights]
    foundations: dict[str, Weights]
    permutations: dict[str, Permutation]


def align_experts(
    foundations: Mapping[str, Source],
    experts: Mapping[str, Source],
    foundation_of: Mapping[str, str],
    match: Match | None,
    like: Mapping[str, Tensor] | None = None,
) -> Aligned:
    """Put experts of several foundations into one order of channels.

    Args:
        foundations: The foundations by name. The common order is that of the first one, unless ``match`` moves it, too.
        experts: The experts by name.
        foundation_of: For every expert the name of the foundation it was fine-tuned from.
        match: Finds the permutations of the foundations, such as :func:`lightning_merge.align.match_many`; None leaves
            all channels where they are (naive merging, the control).
        like: A state dict with the names of the module that the channels are of; models whose names have another prefix
            are seen under these.

    Raises:
        MergeError: If an expert's foundation is not told, or if the models are not of one architecture.
    """
    problems = [
        f"The foundation of the expert {name!r} is not told; give foundation_of={{{name!r}: …}}, one of "
        f"{', '.join(foundations)}."
        for name in experts
        if name not in foundation_of
    ]
    problems += [
        f"foundation_of says that {name!r} is from {foundation!r}, which is no foundation; they are "
        f"{', '.join(foundations)}."
        for name, foundation in foundation_of.items()
        if foundation not in foundations
    ]
    problems += [
        f"foundation_of speaks of {name!r}, which is no expert; the experts are {', '.join(experts)}."
        for name in foundation_of
        if name not in experts
    ]
    if not foundations:
        problems.append("There are no foundations; give the models that the experts were fine-tuned from.")
    raise_all(problems)
    opened = {name: open_weights(source, f"foundation {name}") for name, source in foundations.items()}
    reference = open_weights(like, "the module") if like is not None else next(iter(opened.values()))
    opened = {name: match_names(reference, weights) for name, weights in opened.items()}
    opened_experts = {name: _open_expert(name, source, opened[foundation_of[name]]) for name, source in experts.items()}
    if match is None:
        return Aligned(Mean("the common initialisation", opened), opened_experts, opened, {})
    permutations = dict(match(opened))
    moved: dict[str, Weights] = {name: Permuted(weights, permutations[name]) for name, weights in opened.items()}
    permuted: dict[str, Weights] = {
        name: Permuted(weights, permutations[foundation_of[name]]) for name, weights in opened_experts.items()
    }
    return Aligned(Mean("the common initialisation", moved), permuted, moved, permutations)


def _open_expert(name: str, source: Source, foundation: Weights) -> Weights:
    """Open an expert under the names under which its foundation is seen; its head may have another shape."""
    original = own_names(foundation)
    expert = match_names(original, open_expert(source, original, f"expert {name}"))
    if not isinstance(foundation, Renamed):
        return expert
    prefix = foundation.prefix  # of the head, too, which the foundation may lack
    return Renamed(expert, {prefix.applied(key): key for key in expert}, prefix)
