"""Run a module with one model's weights after the other's, on the same batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_merge.checkpoints import open_weights
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.modules import (
    all_tensors,
    common_dtype,
    complete_state,
    device_of,
    evaluating,
    fit_problems,
    plain,
)


def run(module: nn.Module, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Run a module on images ``(N, …)`` in float32 or float64, with these weights; those that they lack are its own."""
    module = plain(module)
    module_state = module.state_dict()
    tied = open_weights(module_state, "the module").tied
    untied = {tied.get(name, name): tensor for name, tensor in weights.items()}
    lacking = {name: tensor for name, tensor in module_state.items() if tied.get(name, name) not in untied}
    state = complete_state(module, {**lacking, **untied, **weights}, "the model")
    images = images.to(common_dtype(state)) if images.is_floating_point() else images
    return functional_call(module, state, (images,), tie_weights=False)


def read_batches(batches: Iterable[Any], device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the images ``(N, …)`` of each batch and its labels ``(N,)``, or None where it has none.

    Raises:
        MergeError: If there is no batch, or if one holds something else.
    """
    empty = True
    for batch in batches:
        images, labels = (*batch, None, None)[:2] if isinstance(batch, (tuple, list)) else (batch, None)
        if not isinstance(images, Tensor) or not isinstance(labels, (Tensor, type(None))):
            raise MergeError(
                f"A batch of the data holds a {type(images).__name__}; it must be images or (images, labels), as "
                "tensors."
            )
        empty = empty and len(images) == 0
        if len(images):
            yield images.to(device), None if labels is None else labels.to(device)
    if empty:
        raise MergeError(
            "The data hold no sample; give at least one batch, and a list or a DataLoader to read them twice."
        )


def loss_and_accuracy(module: nn.Module, batches: Iterable[Any], weights: Mapping[str, Tensor]) -> tuple[float, float]:
    """Measure the mean cross-entropy, in nats, and the accuracy, in [0, 1], of a model on ``(images, labels)``.

    Args:
        module: Maps images to logits ``(N, classes)``.
        batches: The data; a list or a DataLoader, if they are read for several models.
        weights: The model.

    Raises:
        MergeError: If the data are empty or have no labels, or if weights have another shape than the module's.
    """
    check_weights(module, weights)
    loss = hits = count = 0.0
    with evaluating(module), torch.no_grad():
        for images, labels in read_batches(batches, device_of(module)):
            if labels is None:
                raise MergeError("The data have no labels to compute a loss from; give batches of (images, labels).")
            logits = run(module, weights, images).float()
            loss += F.cross_entropy(logits, labels.long(), reduction="sum").item()
            hits += (logits.argmax(dim=1) == labels).sum().item()
            count += len(labels)
    return loss / count, hits / count


def check_weights(module: nn.Module, weights: Mapping[str, Tensor], name: str = "the model") -> None:
    """Raise a :class:`MergeError` unless a module can be run with these weights."""
    raise_all(fit_problems(all_tensors(plain(module)), weights, name, "within"))


def check_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: tuple[str, str] = ("first", "second")) -> None:
    """Raise a :class:`MergeError` unless two models have the same parameters, in the same shapes."""
    first, second = names
    raise_all(
        [f"The {first} model lacks {key!r}, which the {second} one has." for key in b if key not in a]
        + [f"The {second} model lacks {key!r}, which the {first} one has." for key in a if key not in b]
        + [
            f"{key!r} has shape {tuple(a[key].shape)} in the {first} model, {tuple(b[key].shape)} in the {second} one."
            for key in a
            if key in b and a[key].shape != b[key].shape
        ]
    )
