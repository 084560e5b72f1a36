"""Train the head of a merged model anew on its frozen features: the linear probe of TACT's ablation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_merge.repair.calibration import Calibration, run_at
from lightning_merge.repair.find_sites import find_head
from lightning_merge.utilities.batches import read_images
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.modules import plain
from lightning_merge.utilities.sites import Site


def probe_head(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    data: Iterable[Any],
    *,
    head: str | None = None,
    batches: int | None = None,
    decay: float = 1e-4,
    steps: int = 500,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Fit the head of a model to labelled data, by multinomial logistic regression on the features before it.

    The loss is the mean cross-entropy plus ``decay/2 · ‖W‖²`` (in scikit-learn's terms ``C = 1 / (N · decay)``). It is
    convex: L-BFGS, in float64, starts from zero and nothing is drawn. Only these data are read, so give training data.

    Args:
        module: Maps images to logits; its own weights are not used, and it is as before afterwards.
        weights: The weights of the merged model, with a head of the size wanted.
        data: Batches of ``(images, labels)``, labels from 0 to the number of classes − 1.
        head: The path of the head; by default the linear layer whose output is the module's.
        batches: The most batches; by default all.
        decay: How much large weights cost.
        steps: The most iterations of L-BFGS.
        seed: Seed of data that are drawn from PyTorch's global generator.

    Returns:
        The weight and, if the head has one, the bias of the head, by name, as the given ones in dtype and device.

    Raises:
        MergeError: If there is no such head, if the data have no labels or other ones, or if features are not finite.
    """
    module = plain(module)
    calibration = Calibration("the head", data, batches)
    raise_all(calibration.problems())
    head = find_head(module, calibration.first_images()) if head is None else head
    names = {kind: f"{head}.{kind}".lstrip(".") for kind in ("weight", "bias")}
    if not isinstance(dict(module.named_modules()).get(head), nn.Linear) or names["weight"] not in weights:
        raise MergeError(f"head: {head!r} is no linear layer of the model; name the one that gives the logits.")
    labels: list[Tensor] = []
    features: list[Tensor] = []
    images = read_images(_keep_labels(islice(data, batches), labels), "the head")
    run_at(module, weights, [Site(head, -1, input=True)], images, lambda _, x: features.append(x), "the head", seed)
    x, y = torch.cat(features), torch.cat(labels).to(features[0].device)
    classes = len(weights[names["weight"]])
    if x.dim() != 2 or len(x) != len(y) or not x.isfinite().all():
        raise MergeError("The features before the head must be finite, one vector for each label.")
    if y.min() < 0 or y.max() >= classes:
        raise MergeError(f"The labels go from {y.min()} to {y.max()}, but the head has {classes} classes.")
    weight, bias = fit_logistic_regression(x, y, classes, names["bias"] in weights, decay, steps)
    fitted = {names["weight"]: weight} | ({} if bias is None else {names["bias"]: bias})
    return {name: tensor.to(weights[name]) for name, tensor in fitted.items()}


def fit_logistic_regression(
    x: Tensor, y: Tensor, classes: int, has_bias: bool, decay: float, steps: int
) -> tuple[Tensor, Tensor | None]:
    """Fit ``(classes, n)`` and ``(classes,)`` to features ``(N, n)`` and labels ``(N,)``, in float64.

    In float32 the loss is too coarse for the line search: it stops where the logits are still wrong in the third digit.
    """
    if x.device.type == "mps":  # has no float64
        x, y = x.cpu(), y.cpu()
    x = x.double()
    weight = x.new_zeros(classes, x.shape[1]).requires_grad_()
    bias = x.new_zeros(classes).requires_grad_() if has_bias else None
    parameters = [weight] if bias is None else [weight, bias]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        history_size=20,
        tolerance_grad=1e-8,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), y) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), None if bias is None else bias.detach()


def _keep_labels(data: Iterable[Any], labels: list[Tensor]) -> Iterator[Tensor]:
    """Yield the images of batches, whose labels are kept as they are read."""
    for batch in data:
        parts = batch if isinstance(batch, (tuple, list)) else [batch]
        if len(parts) != 2 or not isinstance(parts[1], Tensor):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise MergeError(f"A head is fitted to batches of (images, labels), two tensors; the data give {kinds}.")
        if batch[1].is_floating_point():
            raise MergeError(f"The labels must be integers, one for each image; the data give {batch[1].dtype}.")
        labels.append(batch[1].detach().long().flatten())
        yield batch[0]
