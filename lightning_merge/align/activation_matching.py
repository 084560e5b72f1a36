"""Activation matching: the permutation that brings each unit of a model to the unit that does the same on data.

Li, Yosinski, Clune, Lipson, Hopcroft: Convergent Learning: Do Different Neural Networks Learn the Same
Representations?, 2015; with Pearson's correlation as in Jordan, Sedghi, Saukh, Entezari, Neyshabur: REPAIR:
REnormalizing Permuted Activations for Interpolation Repair, ICLR 2023.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_merge.align.assignment import assign_family
from lightning_merge.align.axes import Orders, groups_of
from lightning_merge.align.correlations import CrossMoments
from lightning_merge.align.descent import Descent
from lightning_merge.align.entries import Entries, Key, aligned_but, entries_along, families, families_along
from lightning_merge.align.permutation import Permutation
from lightning_merge.align.symmetries import Symmetries
from lightning_merge.align.weight_matching import checked
from lightning_merge.utilities.batches import read_images, rereading_problems
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.modules import common_dtype, complete_state, device_of, evaluating, plain, seeded
from lightning_merge.utilities.processes import Processes
from lightning_merge.utilities.sites import Site, at_sites, split_name

TASK = "the alignment"  # what the data are called in messages
AT_ONCE = 32  # samples: all watched activations of so many are in memory


def match_activations(
    module: nn.Module,
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    symmetries: Symmetries,
    batches: Iterable[Any],
    *,
    epsilon: float = 0.0,
    rest: Literal["weights", "identity"] = "weights",
    seed: int = 0,
    distributed: bool = False,
) -> Permutation:
    """Find the permutation of a model whose activations correlate best with those of a reference on the same data.

    One linear assignment for each group (one in the other for heads and the channels within them): correlations of a
    group do not depend on the order of another one. They are taken over all samples and places, and added up over the
    activations that carry the group. Where an activation carries another group along another axis (the channels in
    the middle of a token-mixing layer), the data are read a second time, when that one's order is known.

    Args:
        module: Runs both models; it is as before afterwards, and its own weights are not used.
        reference: The parameters ``(…)`` by name of the model that stays as it is.
        other: Those of the model whose channels are put into order.
        symmetries: The groups of both, with the activations that carry them (``features``).
        batches: Images ``(N, …)``, or ``(images, labels)``, whose labels are not read. They may be read twice.
        epsilon: See :meth:`lightning_merge.align.CrossMoments.correlation`.
        rest: What happens to :func:`groups_without_features`: they are matched by their weights, or stay.
        seed: The seed of data that are drawn from PyTorch's global generator, and of the matching by weights.
        distributed: Whether the processes of a process group each read batches of their own, and all find the
            permutation for all of them.

    Returns:
        The permutation: its ``apply(other)`` is next to ``reference``.

    Raises:
        MergeError: If the models, the module or the data do not fit, or if there are fewer than two samples.
    """
    processes, module = Processes(distributed), plain(module)
    with processes.together():
        raise_all([] if rest in {"weights", "identity"} else [f"rest={rest!r} must be 'weights' or 'identity'."])
        a, b = checked(reference, symmetries, "the reference"), checked(other, symmetries, "the other model")
        models = complete_state(module, reference, "the reference"), complete_state(module, other, "the other model")
        readings = _readings(symmetries)
        raise_all(rereading_problems(batches, TASK) if len(readings) > 1 else [])
    orders = dict(Permutation.identity(symmetries).orders)
    for reading in readings:
        with seeded(seed, device_of(module)), evaluating(module), processes.together():
            moments, samples = _watch(module, models, reading, batches, orders, symmetries)
        if sum(processes.gather(samples)) < 2:
            raise MergeError(f"The data of {TASK} hold one sample; correlations need two at least, better a thousand.")
        orders |= _assign(reading, moments, symmetries, epsilon, processes)
    rest_groups = groups_without_features(symmetries)
    if rest == "weights" and rest_groups:
        descent = Descent(a, b, Permutation(symmetries, orders), symmetries.groups.keys() - set(rest_groups))
        descent.run(torch.Generator().manual_seed(seed), sweeps=100)
        return descent.permutation
    return Permutation(symmetries, orders)


def groups_without_features(symmetries: Symmetries) -> list[str]:
    """List the groups that no activation carries in a way that determines their order."""
    carried = {group for reading in _readings(symmetries) for feature in reading for group in feature.entries.groups}
    return [group for group in symmetries.groups if group not in carried]


@dataclass(frozen=True)
class _Feature:
    """Entries of an activation, along one axis, that a family of groups orders."""

    site: Site
    entries: Entries
    others: frozenset[str]  # the other families along its axes

    @property
    def family(self) -> str:
        return self.entries.groups[0]


def _features(symmetries: Symmetries) -> Iterator[_Feature]:
    within = symmetries.within
    for name, axes in symmetries.features.items():
        path, is_input = split_name(name)
        along = [(dim, family) for dim, axis in enumerate(axes) for family in families_along(axis, within)]
        for dim, axis in enumerate(axes[1:], start=1):  # the first one holds the samples
            for entries in entries_along(axis, within):
                others = frozenset(family for at, family in along if (at, family) != (dim, entries.groups[0]))
                yield _Feature(Site(path, dim, is_input), entries, others)


def _readings(symmetries: Symmetries) -> list[list[_Feature]]:
    """Divide the features into readings of the data, each after those that find the orders it depends on."""
    features = list(_features(symmetries))
    solved: set[str] = set()  # families
    readings = []
    while ready := [feature for feature in features if feature.family not in solved and feature.others <= solved]:
        readings.append(ready)
        solved |= {feature.family for feature in ready}
    return readings


def _watch(
    module: nn.Module,
    models: tuple[dict[str, Tensor], dict[str, Tensor]],
    reading: list[_Feature],
    batches: Iterable[Any],
    orders: Orders,
    symmetries: Symmetries,
) -> tuple[list[CrossMoments], int]:
    """Run both models on all batches; return the moments of all features, and the number of samples."""
    device, dtype, samples = device_of(module), common_dtype({**models[0], **models[1]}), 0
    moments = [CrossMoments.empty(len(feature.entries.places), device=device) for feature in reading]
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def keep(site: Site, activation: Tensor) -> None:
        seen[site.name].append(activation.clone())

    def compare(site: Site, activation: Tensor) -> None:
        first = seen[site.name].pop(0)
        for feature, feature_moments in zip(reading, moments, strict=True):
            if feature.site.name == site.name:
                a, b = _rows(feature, first, {}, symmetries), _rows(feature, activation, orders, symmetries)
                feature_moments.update(a, b)

    sites = {feature.site.name: Site(feature.site.path, input=feature.site.input) for feature in reading}.values()
    with torch.no_grad():
        for images in read_images(batches, TASK):
            images = images.to(device, dtype if images.is_floating_point() else images.dtype)
            samples += len(images)
            for part in images.split(AT_ONCE):
                for model, act in zip(models, (keep, compare), strict=True):
                    with at_sites(module, sites, act):
                        functional_call(module, model, (part,), tie_weights=False)
                seen.clear()
    return moments, samples


def _rows(feature: _Feature, activation: Tensor, orders: Orders, symmetries: Symmetries) -> Tensor:
    """Arrange an activation ``(N, …)`` as the units of a feature: ``(samples and places, n)``."""
    site, axes = feature.site, symmetries.features[feature.site.name]
    ordered = {dim: axis.size for dim, axis in enumerate(axes) if any(groups_of(axis))}
    if activation.dim() != len(axes) or any(activation.shape[dim] != size for dim, size in ordered.items()):
        raise MergeError(
            f"The activation of {site.name!r} has shape {tuple(activation.shape)} on the data of {TASK}, but "
            f"{tuple(axis.size for axis in axes)} where the permutation groups were found."
        )
    if feature.others:
        activation = aligned_but(activation, axes, orders, symmetries.within, feature.family, site.axis)
    return feature.entries.rows(activation, site.axis).T


def _assign(
    reading: list[_Feature],
    moments: list[CrossMoments],
    symmetries: Symmetries,
    epsilon: float,
    processes: Processes,
) -> dict[str, Tensor]:
    """Add up the moments of all processes, and the correlations of all features; solve every family."""
    scores: dict[str, dict[Key, Tensor]] = defaultdict(dict)
    for feature, feature_moments in zip(reading, moments, strict=True):
        total, *others = processes.gather(feature_moments.to("cpu"))
        for other in others:
            total.merge(other)
        if not bool(total.products.isfinite().all()):
            raise MergeError(
                f"The activation of {feature.site.name!r} is not finite on the data of {TASK}; look at both."
            )
        family_scores, key = scores[feature.family], feature.entries.groups
        family_scores[key] = total.correlation(epsilon) + family_scores.get(key, 0.0)
    by_name = families(symmetries)
    orders: dict[str, Tensor] = {}
    for name, family_scores in scores.items():
        orders |= assign_family(by_name[name], family_scores)
    return orders
