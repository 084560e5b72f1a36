"""Git Re-Basin's weight matching: the permutation that brings a model's weights next to those of another one.

Ainsworth, Hayase, Srinivasa: Git Re-Basin: Merging Models modulo Permutation Symmetries, ICLR 2023, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_merge.align.descent import Descent, compared, inner_product
from lightning_merge.align.permutation import Permutation
from lightning_merge.align.symmetries import Symmetries
from lightning_merge.utilities.errors import raise_all


def match_weights(
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    symmetries: Symmetries,
    *,
    seed: int = 0,
    restarts: int = 2,
    sweeps: int = 100,
) -> Permutation:
    """Find the permutation of a model whose weights are the most similar to those of a reference.

    Group after group is given its best order while the others keep theirs (a linear assignment, in float64), in a
    random order, until no group's order gains anything. The heads of attention and the channels within them are
    matched together, see :func:`lightning_merge.align.assignment.assign_family`.

    Args:
        reference: The parameters ``(…)`` by name of the model that stays as it is.
        other: Those of the model whose channels are put into order.
        symmetries: The groups of both.
        seed: The seed of the order in which the groups are visited, and of the starts.
        restarts: How many times to do so: the first time from the order as it is, as in the paper; the second time
            from an order that grows from the model's inputs and outputs on (:meth:`Descent.grow`), which deep models
            with residual streams may need; then from random ones. The result with the largest similarity is kept.
        sweeps: After how many visits of every group to stop at the latest.

    Returns:
        The permutation: its ``apply(other)`` is next to ``reference``.

    Raises:
        MergeError: If a model has other parameters or shapes, or values that are not finite.
    """
    raise_all([] if restarts > 0 else [f"restarts={restarts} must be at least 1."])
    reference, other = checked(reference, symmetries, "the reference"), checked(other, symmetries, "the other model")
    generator = torch.Generator().manual_seed(seed)
    ends = []
    for restart in range(restarts):
        start = Permutation.random(symmetries, seed + restart) if restart > 1 else Permutation.identity(symmetries)
        descent = Descent(reference, other, start)
        if restart == 1:
            descent.grow()
        descent.run(generator, sweeps)
        ends.append((descent.similarity, descent.permutation))
    return max(ends, key=lambda end: end[0])[1]


def similarity(reference: Mapping[str, Tensor], other: Mapping[str, Tensor], symmetries: Symmetries) -> float:
    """Compute the inner product of the ordered parameters of two models, in float64; weight matching maximizes it."""
    return sum(inner_product(reference[name], other[name]) for name in compared(symmetries))


def distance(reference: Mapping[str, Tensor], other: Mapping[str, Tensor], symmetries: Symmetries) -> float:
    """Compute the Euclidean distance of the ordered parameters of two models, in float64."""
    return sum(float((reference[n].double() - other[n].double()).square().sum()) for n in compared(symmetries)) ** 0.5


def checked(weights: Mapping[str, Tensor], symmetries: Symmetries, fallback: str) -> dict[str, Tensor]:
    """Read the ordered parameters of a model, and check them.

    Raises:
        MergeError: If it has other parameters or shapes, or values that are not finite.
    """
    name = getattr(weights, "name", fallback)
    symmetries.check(weights, name)
    parameters = {parameter: weights[parameter].detach() for parameter in symmetries.axes}
    raise_all(
        [
            f"{parameter!r} of {name} holds values that are not finite; such a model cannot be aligned."
            for parameter, tensor in parameters.items()
            if not bool(tensor.isfinite().all())
        ]
    )
    return parameters
