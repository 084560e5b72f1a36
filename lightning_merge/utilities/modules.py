"""Run a module with other weights than its own, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_merge.utilities.errors import raise_all
from lightning_merge.utilities.tensors import tied_names

Fit = Literal["exactly", "cover", "within"]
"""How weights are to fit a module.

``exactly``: the same names and shapes. ``cover``: a value for every tensor of the module, but that aliases of a tied
one may be missing; other names and shapes do not matter. ``within``: only tensors of the module, in their shapes;
what is missing stays the module's own.
"""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode; afterwards each of its parts is in the mode that it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Keep PyTorch's encoder layers from their fused kernel, which calls none of their parts and runs no hook there.

    Afterwards PyTorch's switch, which is one for the whole process, is as before.
    """
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from PyTorch's global generators as if they had just been seeded; afterwards they are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def device_of(module: nn.Module) -> torch.device:
    """Find the device of a module: that of its first parameter or buffer."""
    first = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def distinct_names(module: nn.Module) -> Iterator[str]:
    """Yield one name for every place that holds a tensor.

    torch's ``functional_call`` does not put back the parameters of a submodule that has two names, given both.
    """
    for prefix, part in module.named_modules():
        yield from (f"{prefix}.{name}".lstrip(".") for name in (*part._parameters, *part._buffers))


def complete_state(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Collect the weights of every place of a module, for ``functional_call(…, tie_weights=False)``.

    They are on the module's device, in float32, or in float64 where one of them is.

    Args:
        module: Says which parameters and buffers there are.
        weights: Their values. The aliases of a tied parameter may be missing.
        what: What to call the weights in messages.

    Raises:
        MergeError: If parameters are missing.
    """
    tensors = stored_tensors(module)
    raise_all(fit_problems(tensors, weights, what, "cover"))
    tied = tied_names(tensors)
    names = [name for name in distinct_names(module) if name in tensors]
    owners = {name: name if name in weights else tied.get(name, name) for name in names}
    values = {owner: weights[owner] for owner in dict.fromkeys(owners.values())}
    dtype, device = common_dtype(values), device_of(module)
    moved = {
        name: tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in values.items()
    }
    return {name: moved[owner] for name, owner in owners.items()}


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Collect the parameters and buffers of a module that its state dict holds; other entries are left out."""
    return {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}


def extra_state(module: nn.Module) -> dict[str, Any]:
    """Collect the other entries of a module's state dict, see ``torch.nn.Module.get_extra_state``."""
    return {name: value for name, value in module.state_dict().items() if not isinstance(value, Tensor)}


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Collect all parameters and buffers of a module, also those that its state dict leaves out."""
    named = (module.named_parameters, module.named_buffers)
    return {name: tensor for tensors in named for name, tensor in tensors(remove_duplicate=False)}


def fit_problems(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], what: str, fit: Fit = "exactly"
) -> list[str]:
    """Check that weights fit a module.

    Args:
        own: The tensors of the module by name; only their names and shapes are looked at.
        weights: The weights; only their names and, but for ``cover``, their shapes are looked at.
        what: What to call the weights in messages: ``the base``, ``expert art``.
        fit: What is asked of them, see :data:`Fit`.

    Returns:
        What is wrong, a sentence each.
    """
    missing = [] if fit == "within" else [name for name in own if name not in weights]
    if fit == "cover":
        tied = tied_names(own)
        missing = [name for name in missing if name not in tied]
    problems = [f"{name!r} of the module is missing in {what}; is that another model?" for name in missing]
    if fit == "cover":
        return problems
    problems += [
        f"{name!r} of {what} is no parameter of the module; give the models' own module."
        for name in weights
        if name not in own and isinstance(weights[name], Tensor)
    ]
    return problems + [
        f"{name!r} has shape {tuple(weights[name].shape)} in {what} and {tuple(own[name].shape)} in the module; is it "
        "of another backbone or head?"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]


def common_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """Choose the dtype that a model is computed in: float64 if any of its weights are, else float32."""
    is_double = any(tensor.dtype == torch.float64 for tensor in weights.values())
    return torch.float64 if is_double else torch.float32


def plain(module: nn.Module) -> nn.Module:
    """Unwrap what ``torch.compile`` returns: the parameters of the module inside have the names of the weights."""
    return getattr(module, "_orig_mod", module)
