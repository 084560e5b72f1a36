"""The greedy soup (Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_merge.checkpoints import Experts, Source, open_experts, open_weights
from lightning_merge.merging.inventory import take_inventory
from lightning_merge.merging.merge import merge
from lightning_merge.merging.merged import Merged
from lightning_merge.merging.origins import check_origins
from lightning_merge.methods.soup import Soup


def greedy_soup(
    base: Source, experts: Experts, score: Callable[[Mapping[str, Tensor]], float], **options: Any
) -> Merged:
    """Cook the greedy soup: from the best expert to the worst, keep each that does not lower the score of the mean.

    Args:
        base: The model that the experts started from.
        experts: The experts: a sequence of sources, or a mapping from a name to a source.
        score: What the weights of a model are worth on held-out data; larger is better. It is called once for every
            expert, and once more for every expert but the best.
        options: What else :func:`lightning_merge.merge` takes, such as ``exclude`` or ``output``.

    Returns:
        The soup; its ``experts`` are the ingredients.
    """
    output = options.pop("output", None)
    base = open_weights(base, name="base")
    sources = open_experts(experts, base)
    inventory = take_inventory(base, list(sources.values()), options.get("include"), options.get("exclude", ()))
    check_origins(base, sources, inventory.merged, options.pop("allow_strangers", False))
    options["allow_strangers"] = True  # once is enough
    alone = {name: score(merge(base, {name: source}, Soup(), **options).weights) for name, source in sources.items()}
    best, *others = sorted(sources, key=lambda name: alone[name], reverse=True)
    ingredients, reached = {best: sources[best]}, alone[best]
    for name in others:
        candidate = ingredients | {name: sources[name]}
        candidate_score = score(merge(base, candidate, Soup(), **options).weights)
        if candidate_score >= reached:
            ingredients, reached = candidate, candidate_score
    return merge(base, ingredients, Soup(), output=output, **options)
