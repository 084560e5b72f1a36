"""Embeddings of several models in one picture (Figure 4 of arXiv 2410.12766)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_merge.analysis.activations import activations_at
from lightning_merge.analysis.losses import check_weights, read_batches
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.modules import device_of
from lightning_merge.utilities.sites import Site


def embed(
    module: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Any], site: Site
) -> tuple[Tensor, Tensor | None]:
    """Compute the activations of a model at a site, averaged over the places of a feature map or the tokens.

    Args:
        module: The model's module.
        weights: The model; parameters that it lacks are the module's own.
        batches: Images ``(N, …)`` or ``(images, labels)``, in the same order for all models that are compared.
        site: The site whose activations are computed.

    Returns:
        The features ``(N, channels)`` and the labels ``(N,)``, or None if the data have none.

    Raises:
        MergeError: If the site does not exist, if the data are empty, or if the model does not fit the module.
    """
    check_weights(module, weights)
    features, labels = [], []
    for images, batch_labels in read_batches(batches, device_of(module)):
        activation = activations_at(module, weights, images, [site])[site].movedim(site.axis, -1)
        features.append(activation.reshape(len(activation), -1, activation.shape[-1]).mean(dim=1).float().cpu())
        labels += [] if batch_labels is None else [batch_labels.cpu()]
    return torch.cat(features), torch.cat(labels) if labels else None


def project(
    features: Mapping[str, Tensor], method: Literal["tsne", "pca"] = "tsne", seed: int = 0
) -> dict[str, Tensor]:
    """Project the features of several models onto one plane, by one fit to all of them.

    Args:
        features: The features of each model ``(N, channels)``.
        method: t-SNE (van der Maaten and Hinton, 2008), or the two principal components.
        seed: The seed of t-SNE.

    Returns:
        The points of each model ``(N, 2)``.

    Raises:
        MergeError: If the models have other numbers of channels, or if there are too few samples.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    widths = {name: samples.shape[1] for name, samples in features.items()}
    counts = [len(samples) for samples in features.values()]
    count = sum(counts)
    problems = [f"The method must be tsne or pca, got {method!r}."] if method not in ("tsne", "pca") else []
    if len(set(widths.values())) > 1:
        problems.append(f"The models have features of different widths ({widths}); they cannot share a plane.")
    if count < 5 or min(widths.values(), default=0) < 2:
        problems.append(f"A plane needs at least 5 samples of 2 channels, got {count} of {widths}.")
    raise_all(problems)
    together = torch.cat(list(features.values())).double().numpy()
    if not bool(torch.isfinite(torch.from_numpy(together)).all()):
        raise MergeError("The features hold values that are not finite; did a model diverge?")
    perplexity = min(30.0, (count - 1) / 4)
    fit = PCA(2) if method == "pca" else TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    places = torch.from_numpy(fit.fit_transform(together)).float()
    return dict(zip(features, places.split(counts), strict=True))
