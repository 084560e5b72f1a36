"""Git Re-Basin's straight-through estimator: refine a permutation by the loss between two models, with labels.

Ainsworth, Hayase, Srinivasa: Git Re-Basin: Merging Models modulo Permutation Symmetries, ICLR 2023, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_merge.align.activation_matching import TASK
from lightning_merge.align.descent import Descent
from lightning_merge.align.permutation import Permutation
from lightning_merge.align.symmetries import Symmetries
from lightning_merge.align.weight_matching import checked
from lightning_merge.utilities.batches import read_images, rereading_problems
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.modules import common_dtype, complete_state, device_of, evaluating, plain, seeded

Loss = Callable[[Tensor, Tensor], Tensor]


def refine_straight_through(
    module: nn.Module,
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    symmetries: Symmetries,
    batches: Iterable[Any],
    permutation: Permutation,
    *,
    loss: Loss = F.cross_entropy,
    learning_rate: float = 1e-2,
    momentum: float = 0.9,
    epochs: int = 10,
    seed: int = 0,
) -> Permutation:
    """Search near a permutation for one with which the model halfway between the two has a smaller loss.

    A guide starts as the reference. In every step the permutation is the one that brings ``other`` next to the guide
    (weight matching, from the last one on). The forward pass runs the mean of the reference and of the permuted model;
    the backward pass takes the gradient to the guide instead. The module is in evaluation mode; running statistics
    are halfway, too. After every epoch in which the permutation has changed, the loss is computed on all batches.

    Args:
        module: Runs the models; it is as before afterwards, and its own weights are not used.
        reference: The parameters ``(…)`` by name of the model that stays as it is.
        other: Those of the model whose channels are put into order.
        symmetries: The groups of both.
        batches: ``(images, labels)``, ``(N, …)`` each, read again in every epoch.
        permutation: Where to start, such as what :func:`lightning_merge.align.match_weights` finds.
        loss: Computes the mean loss ``()`` over the samples, from outputs ``(N, …)`` and labels ``(N, …)``.
        learning_rate: The learning rate of SGD on the guide; the authors' is 0.01.
        momentum: The momentum of SGD on the guide.
        epochs: How many times to read the data.
        seed: The seed of data that are drawn from PyTorch's global generator, and of the matching.

    Returns:
        The permutation with the smallest loss on all batches; ``permutation`` itself if none has a smaller one.

    Raises:
        MergeError: If the models, the module or the data do not fit.
    """
    module = plain(module)
    raise_all([*rereading_problems(batches, TASK), *([] if epochs > 0 else [f"epochs={epochs} must be at least 1."])])
    checked(reference, symmetries, "the reference")
    checked(other, symmetries, "the other model")
    a, b = complete_state(module, reference, "the reference"), complete_state(module, other, "the other model")
    device, dtype = device_of(module), common_dtype({**a, **b})
    generator = torch.Generator().manual_seed(seed)

    def loss_of(weights: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return loss(functional_call(module, weights, (images,), tie_weights=False), labels)

    def total(candidate: Permutation) -> float:
        middle = _middle(a, _permuted(candidate, b))
        with torch.no_grad():
            losses = [(len(x), float(loss_of(middle, x, y))) for x, y in _read(batches, device, dtype)]
        if not losses:
            raise MergeError(f"The data of {TASK} hold no batch; give at least one.")
        return sum(count * value for count, value in losses) / sum(count for count, _ in losses)

    with seeded(seed, device), evaluating(module):
        best = current = seen = permutation
        smallest = total(best)
        trained = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        owners = {id(tensor): tensor.clone().requires_grad_() for name, tensor in a.items() if name in trained}
        guide = {name: owners[id(tensor)] for name, tensor in a.items() if id(tensor) in owners}
        optimizer = torch.optim.SGD(owners.values(), lr=learning_rate, momentum=momentum)
        for _ in range(epochs):
            for images, labels in _read(batches, device, dtype):
                current = _next_to({**a, **guide}, b, current, generator)
                permuted = _permuted(current, b)
                through = {name: permuted[name] + (tensor - tensor.detach()) for name, tensor in guide.items()}
                optimizer.zero_grad()
                loss_of(_middle(a, {**permuted, **through}), images, labels).backward()
                optimizer.step()
            if not _same(current, seen):
                reached, seen = total(current), current
                if reached < smallest:
                    best, smallest = current, reached
    return best


def _next_to(
    guide: Mapping[str, Tensor], other: Mapping[str, Tensor], start: Permutation, generator: torch.Generator
) -> Permutation:
    names = start.symmetries.axes
    first, second = ({name: weights[name].detach() for name in names} for weights in (guide, other))
    descent = Descent(first, second, start)
    descent.run(generator, sweeps=100)
    return descent.permutation


def _permuted(permutation: Permutation, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: permutation.apply_to(name, tensor) for name, tensor in weights.items()}


def _middle(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Average two models; tensors that are not floating-point are the first one's."""
    return {
        name: (tensor + second[name]) / 2 if tensor.is_floating_point() else tensor for name, tensor in first.items()
    }


def _same(first: Permutation, second: Permutation) -> bool:
    return all(torch.equal(order, second.orders[name]) for name, order in first.orders.items())


def _read(batches: Iterable[Any], device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        (images,) = read_images([batch], TASK)
        if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[1], Tensor):
            raise MergeError(f"A batch of the data of {TASK} has no labels; give (images, labels), as tensors.")
        yield images.to(device, dtype if images.is_floating_point() else images.dtype), batch[1].to(device)
