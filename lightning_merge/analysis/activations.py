"""Distance of a merged model's activations to an expert's, site by site, and the share of variance that is left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge.analysis.losses import check_weights, read_batches, run
from lightning_merge.utilities.errors import raise_all
from lightning_merge.utilities.modules import device_of, evaluating
from lightning_merge.utilities.sites import Site, at_sites


@dataclass(frozen=True)
class SiteDifference:
    """The difference between a merged model's and an expert's activations at a site (Figure 3 of arXiv 2410.12766).

    Args:
        site: The site.
        distance: The mean over the samples of ``||h_merged - h_expert||``, a norm over all channels and places.
        relative_distance: The distance, divided by the mean of ``||h_expert||``.
        variance_ratio: The mean over the channels of the merged model's variance, divided by that of the expert's.
            Below 1 the activations have collapsed.
        median_variance_ratio: The median over the channels of the ratio of their variances; channels that do not vary
            in the expert are left out.
    """

    site: Site
    distance: float
    relative_distance: float
    variance_ratio: float
    median_variance_ratio: float


def compare_activations(
    module: nn.Module,
    merged: Mapping[str, Tensor],
    expert: Mapping[str, Tensor],
    batches: Iterable[Any],
    sites: Sequence[Site],
    merged_module: nn.Module | None = None,
) -> list[SiteDifference]:
    """Compare the activations of a merged model with those of an expert on the expert's data.

    Args:
        module: The models' module.
        merged: The merged model; parameters that it lacks (a head) are the module's own.
        expert: The expert, permuted if the merged model was made of permuted experts: channels are compared one by one.
        batches: Images ``(N, …)`` or ``(images, labels)``.
        sites: The sites to compare at.
        merged_module: Runs the merged model in the module's place, such as a copy with corrections.

    Returns:
        A record for each site, in their order.

    Raises:
        MergeError: If a site does not exist, if the data are empty, or if a model does not fit its module.
    """
    runs = ((merged_module or module, merged, "the merged model"), (module, expert, "the expert"))
    for runner, weights, name in runs:
        check_weights(runner, weights, name)
    differences = {site: _Differences() for site in sites}
    for images, _ in read_batches(batches, device_of(module)):
        of_merged, of_expert = (activations_at(runner, weights, images, sites) for runner, weights, _ in runs)
        for site, sums in differences.items():
            sums.add(site, of_merged[site], of_expert[site])
    return [sums.record(site) for site, sums in differences.items()]


def activations_at(
    module: nn.Module, weights: Mapping[str, Tensor], images: Tensor, sites: Iterable[Site]
) -> dict[Site, Tensor]:
    """Compute the activations of a model on images ``(N, …)``, at each site.

    Raises:
        MergeError: If a site does not exist, or if the module does not call it.
    """
    sites = list(sites)
    activations: dict[Site, Tensor] = {}

    def keep(site: Site, activation: Tensor) -> None:
        activations[site] = activation.clone()

    with evaluating(module), torch.no_grad(), at_sites(module, sites, keep):
        run(module, weights, images)
    missed = [site for site in sites if site not in activations]
    raise_all([f"{site.name} was not reached when the model ran; leave it out." for site in missed])
    return activations


class _Differences:
    """Sums over the samples, in float64."""

    def __init__(self) -> None:
        self.samples = self.rows = 0
        self.distance = self.norm = 0.0
        self.sums = torch.zeros((), dtype=torch.float64)  # (2, 2, channels) with data: values, squares; merged, expert

    def add(self, site: Site, merged: Tensor, expert: Tensor) -> None:
        merged, expert = merged.double(), expert.double()
        self.samples += len(merged)
        self.distance += (merged - expert).flatten(1).norm(dim=1).sum().item()
        self.norm += expert.flatten(1).norm(dim=1).sum().item()
        rows = torch.stack([site.channels_last(merged), site.channels_last(expert)])  # (2, rows, channels)
        self.rows += rows.shape[1]
        self.sums = self.sums + torch.stack([rows.sum(dim=1), rows.square().sum(dim=1)])

    def record(self, site: Site) -> SiteDifference:
        means, squares = self.sums / self.rows
        merged, expert = (squares - means.square()).clamp_min(0)  # variances (channels,)
        varying = expert > _DEAD * squares[1]
        ratios = (merged / expert)[varying]
        return SiteDifference(
            site,
            self.distance / self.samples,
            _ratio(self.distance, self.norm),
            _ratio(merged.mean().item(), expert.mean().item() if bool(varying.any()) else 0.0),
            ratios.median().item() if len(ratios) else 1.0,
        )


_DEAD = 1e-12  # a channel whose variance is below this share of its mean square is constant up to rounding


def _ratio(value: float, reference: float) -> float:
    """Compute a ratio: 1 for two zeros, infinite for a zero in the denominator alone."""
    if reference > 0:
        return value / reference
    return 1.0 if value == 0 else math.inf
