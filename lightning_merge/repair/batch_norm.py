"""Re-estimate the running statistics of BatchNorm, which are not those of the merged model's activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge.repair.calibration import Calibration, correct_in_turn
from lightning_merge.repair.moments import Moments
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.modules import plain
from lightning_merge.utilities.processes import Processes
from lightning_merge.utilities.sites import Site

_STATISTICS = ("running_mean", "running_var")


def reestimate_batch_norm(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    data: Iterable[Any],
    *,
    batches: int | None = None,
    distributed: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Set the running statistics of every BatchNorm to those of its inputs on some data.

    As in training, each layer normalises by the statistics of the batch, so that the layers behind it see what they
    will see in the end: one pass is enough (REPAIR's "BatchNorm reset", arXiv 2211.08403). The mean and the unbiased
    variance are those of all images together, whatever the size of the batches.

    Args:
        module: Maps images to logits; its own weights are not used, and it is as before afterwards.
        weights: The weights of the merged model.
        data: Batches of images or ``(images, labels)``; under several processes, this one's part of every batch.
        batches: The most batches; by default all.
        distributed: Whether the processes of the default process group share the data.
        seed: Seed of data that are drawn from PyTorch's global generator.

    Returns:
        New weights, which share all but the running statistics with those that were given.

    Raises:
        MergeError: If the module has no BatchNorm with running statistics, if the data are too few, or if an
            activation is not finite.
    """
    module = plain(module)
    layers = {
        path: part
        for path, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_var is not None
    }
    if not layers:
        raise MergeError("The model has no BatchNorm with running statistics to re-estimate; leave this step out.")
    calibration = Calibration("the BatchNorm statistics", data, batches, 1, seed, Processes(distributed))
    raise_all(calibration.problems())
    neutral = {
        _name(path, name): torch.full_like(getattr(layer, name), value, dtype=torch.float32)
        for path, layer in layers.items()
        for name, value in zip(_STATISTICS, (0.0, 1.0), strict=True)
    }
    sites = {Site(path, axis=1, input=True): layer for path, layer in layers.items()}

    def normalise(site: Site, now: Moments) -> tuple[Tensor, Tensor]:
        """Compute scale and shift ``(channels,)`` as in training; the layer itself then only divides by √(1 + ε)."""
        eps = sites[site].eps
        scale = ((1 + eps) / (now.variance + eps)).sqrt()
        return scale, -scale * now.mean

    reestimated = dict(weights)
    for site, moments in correct_in_turn(module, {**weights, **neutral}, sites, normalise, calibration).items():
        unbiased = moments.variance * moments.count / (moments.count - 1)
        for name, value in zip(_STATISTICS, (moments.mean, unbiased), strict=True):
            reestimated[_name(site.path, name)] = value.to(weights[_name(site.path, name)])
    return reestimated


def _name(path: str, name: str) -> str:
    return f"{path}.{name}".lstrip(".")
