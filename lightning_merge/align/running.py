"""Run a module with the weights of several models, on the same batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge.errors import MergeError, raise_all
from lightning_merge.running import device_of, images_of

DATA = "the data for the alignment"


def weights_of(module: nn.Module, weights: Mapping[str, Tensor], fallback: str) -> dict[str, Tensor]:
    """What :func:`torch.func.functional_call` needs to run a module as a model: on its device, at least in float32.

    Args:
        module: The module; names that share a tensor stand once.
        weights: The model.
        fallback: What the model is called if it has no name.

    Raises:
        MergeError: If the model lacks something of the module, or has it in another shape.
    """
    name, saved = getattr(weights, "name", fallback), module.state_dict()
    own = {key: tensor for key, tensor in [*module.named_parameters(), *module.named_buffers()] if key in saved}
    meta = getattr(weights, "meta", weights)
    raise_all(
        [
            f"The module has {key!r} with shape {tuple(tensor.shape)}, and {name} "
            + (f"has it with {tuple(meta[key].shape)}" if key in meta else "lacks it")
            + "; give the models' own module."
            for key, tensor in own.items()
            if key not in meta or meta[key].shape != tensor.shape
        ]
    )
    return {key: moved(weights[key].detach(), device_of(module)) for key in own}


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, at least in float32."""
    if not tensor.is_floating_point():
        return tensor.to(device)
    return tensor.to(device, torch.promote_types(tensor.dtype, torch.float32))


def check_batches(batches: Iterable[Any], *, again: bool) -> None:
    """Raise a :class:`MergeError` if batches can be read only once but must be read again and again."""
    if again and isinstance(batches, Iterator):
        raise MergeError(f"{DATA.capitalize()} can be read only once; give a DataLoader or a list of batches.")


def read_images(batches: Iterable[Any], device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """Read the images ``(N, …)`` of every batch.

    Raises:
        MergeError: If a batch is something else.
    """
    for batch in batches:
        images = images_of(batch, DATA)
        yield images.to(device, dtype if images.is_floating_point() else images.dtype)


def dtype_of(*models: Mapping[str, Tensor]) -> torch.dtype:
    """The type in which models are run: the widest of their own."""
    found = torch.float32
    for tensor in (tensor for model in models for tensor in model.values() if tensor.is_floating_point()):
        found = torch.promote_types(found, tensor.dtype)
    return found
