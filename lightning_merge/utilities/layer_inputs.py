"""The inputs of a module's linear layers while it runs."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_merge.utilities.modules import unfused_attention


@contextmanager
def watch_inputs(module: nn.Module, names: Collection[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show the inputs of linear layers: of ``Linear``, ``Conv2d`` (without groups) and ``MultiheadAttention``.

    Args:
        module: The module that will be run.
        names: The weights whose layers are watched.
        see: Called with the name of a weight and the inputs ``(N, in)`` whenever they are multiplied by it; those of a
            kernel are patches ``(N, in · height · width)``.
    """

    def watch(part: nn.Module, prefix: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for weight in weights:
                rows = _rows(part, weight, args, kwargs)
                if rows is not None:
                    see(prefix + weight, rows.detach())

        weights = [weight for weight in _weights(part) if prefix + weight in names]
        return part.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(part, f"{path}." if path else "") for path, part in module.named_modules() if _weights(part)]
    try:
        with unfused_attention():
            yield
    finally:
        for handle in handles:
            handle.remove()


def watchable(module: nn.Module) -> list[str]:
    """List all weights whose inputs :func:`watch_inputs` can show."""
    return [f"{path}.{weight}".lstrip(".") for path, part in module.named_modules() for weight in _weights(part)]


def _weights(part: nn.Module) -> tuple[str, ...]:
    if isinstance(part, nn.MultiheadAttention):
        return ("in_proj_weight", "out_proj.weight")
    if isinstance(part, nn.Conv2d) and (
        part.groups > 1 or part.padding_mode != "zeros" or isinstance(part.padding, str)
    ):
        return ()
    return ("weight",) if isinstance(part, (nn.Linear, nn.Conv2d)) else ()


def _rows(part: nn.Module, weight: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Find the inputs that are multiplied by a weight: ``(N, in)``; None if there are several for one weight."""
    if isinstance(part, nn.MultiheadAttention) and weight == "out_proj.weight":
        return _attended(part, args, kwargs).flatten(0, -2)
    arguments = [*args, *kwargs.values()]
    inputs = arguments[0]
    if weight == "in_proj_weight":
        return inputs.flatten(0, -2) if arguments[1] is inputs and arguments[2] is inputs else None
    if isinstance(part, nn.Conv2d):
        assert not isinstance(part.padding, str)  # whose weight is not watched
        patches = F.unfold(inputs, part.kernel_size, part.dilation, part.padding, part.stride)  # (N, in·h·w, places)
        return patches.mT.flatten(0, 1)
    return inputs.reshape(inputs.shape[:-1].numel(), inputs.shape[-1])


def _attended(attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Compute the inputs ``(…, in)`` of the output projection, which attention applies without calling it.

    They are the output with an identity in its place.
    """
    bias = attention.out_proj.bias is not None
    identity = nn.Linear(attention.embed_dim, attention.embed_dim, bias).to(args[0] if args else kwargs["query"])
    nn.init.eye_(identity.weight)
    if bias:
        nn.init.zeros_(identity.bias)
    twin = copy.copy(attention)  # shares the parameters, but has neither the projection nor the hooks
    twin._modules, twin._forward_pre_hooks = {"out_proj": identity}, OrderedDict()
    return twin(*args, **kwargs)[0]
