"""Run a model on calibration data: what its activations are, and what they become as sites are corrected in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_merge.repair.moments import Moments
from lightning_merge.utilities.batches import read_images, rereading_problems
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.modules import common_dtype, complete_state, device_of, evaluating, plain, seeded
from lightning_merge.utilities.processes import Processes
from lightning_merge.utilities.sites import Act, Site, at_sites

NewMoments = Callable[[], Moments]
"""A function that makes what accumulates the batches; ``Moments`` pools them."""


@dataclass(frozen=True)
class Calibration:
    """The calibration images of one task, and how they are read.

    A last batch that is less than half as large as the one before it joins that one: the statistics of few images are
    too noisy to normalise by.

    Args:
        task: What to call them in messages.
        batches: Batches of images or ``(images, labels)``; with several processes, this one's part of every batch.
        limit: The most batches of one pass.
        passes: How often they are read.
        seed: Seed of data that are drawn from PyTorch's global generator.
        processes: The processes that read parts of the same batches.
    """

    task: str
    batches: Iterable[Any]
    limit: int | None = None
    passes: int = 1
    seed: int = 0
    processes: Processes = Processes()  # noqa: RUF009, this one alone: never changed

    def problems(self) -> list[str]:
        """List what is wrong with the arguments, in sentences."""
        return rereading_problems(self.batches, self.task) + [
            f"{name} must be at least 1, got {value}."
            for name, value in (("batches", self.limit), ("passes", self.passes))
            if value is not None and value < 1
        ]

    def read(self) -> Iterator[Tensor]:
        """Read this process's part of every batch: ``(N, …)``.

        Raises:
            MergeError: On every process, if there is no batch or one of a single image, or if the processes have
                different numbers of batches.
        """
        pending: list[tuple[Tensor, int]] = []
        for images, size in self._sized():
            pending.append((images, size))
            if len(pending) > 2:
                yield self._checked(*pending.pop(0))
        if len(pending) == 2 and 2 * pending[1][1] < pending[0][1]:
            (before, size), (last, last_size) = pending
            pending = [(torch.cat([before, last]), size + last_size)]
        for images, size in pending:
            yield self._checked(images, size)

    def first_images(self) -> Tensor:
        """Read the images ``(N, …)`` of the first batch."""
        return next(read_images(self.batches, self.task))

    def _sized(self) -> Iterator[tuple[Tensor, int]]:
        """Yield the batches, each with the number of its images over all processes."""
        passes = (read_images(islice(self.batches, self.limit), self.task) for _ in range(self.passes))
        for batch in self.processes.in_step(chain.from_iterable(passes), f"batches of {self.task}"):
            yield batch, sum(self.processes.gather(len(batch)))

    def _checked(self, images: Tensor, size: int) -> Tensor:
        if size < 2:
            raise MergeError(
                f"A batch of the data of {self.task} holds {size} image{'' if size == 1 else 's'}, which has no "
                "variance; give at least 2 images in each batch (some hundreds in all)."
            )
        return images


def observe(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    sites: Iterable[Site],
    data: Calibration,
    new: NewMoments = Moments,
) -> dict[Site, Moments]:
    """Compute the statistics of the activations at every site, of a model as it is.

    Raises:
        MergeError: If an activation is not finite, or if the data cannot be read.
    """
    moments: dict[Site, Moments] = {}

    def act(site: Site, activation: Tensor) -> None:
        _add(moments, site, activation, data, new)

    sites = list(sites)
    run_at(module, weights, sites, data.read(), act, data.task, data.seed)
    return _each(moments, sites, data)


Known = dict[tuple[str, ...], dict[Site, Moments]]
"""Statistics that were found before, by the names of the model and of the data; of these sites at least."""


def observe_once(
    known: Known | None,
    names: tuple[str, ...],
    module: nn.Module,
    weights: Mapping[str, Tensor],
    sites: Iterable[Site],
    data: Calibration,
    new: NewMoments = Moments,
) -> dict[Site, Moments]:
    """Look up the statistics of a model on these data, and :func:`observe` them if they are not known."""
    known = {} if known is None else known
    sites = list(sites)
    if names not in known:
        known[names] = observe(module, weights, sites, data, new)
    return {site: known[names][site] for site in sites}


def known_problems(
    known: Mapping[Site, Moments],
    module: nn.Module,
    weights: Mapping[str, Tensor],
    sites: Iterable[Site],
    data: Calibration,
) -> list[str]:
    """Check that recorded statistics are those of a model's sites, and list what is wrong, in sentences."""
    channels: dict[Site, int] = {}

    def act(site: Site, activation: Tensor) -> None:
        channels[site] = activation.shape[site.axis]

    run_at(module, weights, sites, [data.first_images()[:2]], act, data.task, data.seed)
    why = "record them anew with this model"
    return [
        f"The moments recorded of {data.task} lack the site {site.name!r}, which is corrected; {why}."
        for site in channels
        if site not in known
    ] + [
        f"The moments recorded of {data.task} have {len(known[site].mean)} channels at the site {site.name!r}, where "
        f"the model has {width}; {why}."
        for site, width in channels.items()
        if site in known and len(known[site].mean) != width
    ]


@dataclass(frozen=True)
class Goals:
    """The statistics that activations are to have, and how far they are taken there.

    Args:
        mean: By site, ``(channels,)``.
        std: By site, ``(channels,)``.
        max_gain: The most that a channel is scaled by; infinity for no limit.
        eps: Added to the variance that a channel has. If that is less than ``eps`` times the one it should have,
            the channel is dead: no scale brings back what it has lost, so that it is only shifted (unless there is no
            limit).
    """

    mean: Mapping[Site, Tensor]
    std: Mapping[Site, Tensor]
    max_gain: float = 10.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if not (self.max_gain > 0 and self.eps > 0):
            raise MergeError(f"max_gain and eps must be positive, got {self.max_gain} and {self.eps}.")

    def affine(self, site: Site, now: Moments) -> tuple[Tensor, Tensor]:
        """Compute the scale and the shift that take a site from its present statistics: ``(channels,)`` each, float64.

        That is ``a = σ* / √(v + ε)`` and ``b = μ* − a·m``, which are finite for every channel.
        """
        std = self.std[site]
        scale = (std / (now.variance + self.eps).sqrt()).clamp(max=self.max_gain)
        if math.isfinite(self.max_gain):
            scale = scale.masked_fill(now.variance < self.eps * std.square(), 1.0)
        return scale, self.mean[site] - scale * now.mean


def correct_in_turn(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    sites: Iterable[Site],
    affine: Callable[[Site, Moments], tuple[Tensor, Tensor]],
    data: Calibration,
    new: NewMoments = Moments,
) -> dict[Site, Moments]:
    """Compute the statistics at every site, with all sites before it corrected: in one pass, as BatchNorm trains.

    In each batch every site is corrected by the statistics of this batch over all processes; what comes behind it sees
    that.

    Args:
        module: Maps images to logits.
        weights: The weights that it is run with.
        sites: Which activations.
        affine: The scale and the shift for the statistics that a site has, ``(channels,)`` each.
        data: What it is run on.
        new: Makes what accumulates the batches.

    Raises:
        MergeError: If an activation is not finite, or if the data cannot be read.
    """
    moments: dict[Site, Moments] = {}
    sites = list(sites)

    def act(site: Site, activation: Tensor) -> Tensor:
        batch = _add(moments, site, activation, data, new)
        scale, shift = (site.along(values.to(activation), activation) for values in affine(site, batch))
        return activation * scale + shift

    run_at(module, weights, sites, data.read(), act, data.task, data.seed)
    return _each(moments, sites, data)


def _add(moments: dict[Site, Moments], site: Site, activation: Tensor, data: Calibration, new: NewMoments) -> Moments:
    """Add a batch of activations to the moments of its site; return those of the batch, over all processes."""
    batch = Moments.of(site.channels_last(activation)).gathered(data.processes)
    if not batch.is_finite:
        raise MergeError(
            f"The activations at {site.name} are not finite on the data of {data.task}; look for NaN or infinity in "
            "the images and in the weights."
        )
    moments.setdefault(site, new()).merge(batch)
    return batch


def run_at(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    sites: Iterable[Site],
    images: Iterable[Tensor],
    act: Act,
    task: str,
    seed: int,
) -> None:
    """Run a module with other weights on all images, and call ``act`` with the activations at some sites.

    Args:
        module: Maps images to logits; it is as before afterwards.
        weights: The weights that it is run with, in float32 (float64 if one of them is).
        sites: Which activations.
        images: Batches ``(N, …)``, read while the global generator is seeded.
        act: What is done, see :func:`lightning_merge.utilities.sites.at_sites`.
        task: What to call the weights in messages.
        seed: The seed.
    """
    module = plain(module)
    device = device_of(module)
    state = complete_state(module, weights, f"the model for {task}")
    dtype = common_dtype(state)
    with (
        seeded(seed, device),
        evaluating(module),
        torch.autocast(device.type, enabled=False),
        torch.no_grad(),
        at_sites(module, sites, act),
    ):
        for batch in images:
            batch = batch.to(device, dtype if batch.is_floating_point() else batch.dtype)
            functional_call(module, state, (batch,), tie_weights=False)


def _each(moments: Mapping[Site, Moments], sites: Iterable[Site], data: Calibration) -> dict[Site, Moments]:
    raise_all(
        [
            f"{site.name} was not reached when the model ran on the data of {data.task}; leave it out of the sites."
            for site in sites
            if site not in moments
        ]
    )
    return {site: moments[site] for site in sites}
