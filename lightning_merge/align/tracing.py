"""Trace a module into a graph of ATen operators in which the activations of its parts can be found again."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.modules import unfused_attention

BY_HAND = "Describe its groups by hand with Symmetries.from_axes or Symmetries.from_json."


@torch.library.custom_op("lightning_merge::site", mutates_args=(), schema="(Tensor x, str name) -> Tensor")
def mark(x: Tensor, name: str) -> Tensor:
    """Leave the name of a site in a graph, next to its activation ``(…)``, which is copied."""
    return x.clone()


@mark.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


SITE = torch.ops.lightning_merge.site.default


def copied(module: nn.Module) -> nn.Module:
    """Copy a module, in evaluation mode and without the trainer that a LightningModule may hold.

    Raises:
        MergeError: If the module cannot be copied.
    """
    trainer = getattr(module, "__dict__", {}).get("_trainer")
    try:
        copy_ = copy.deepcopy(module, {} if trainer is None else {id(trainer): _NO_TRAINER})
    except Exception as error:
        raise MergeError(f"The module cannot be copied in order to trace it: {_sentence(error)} {BY_HAND}") from error
    if trainer is not None:
        copy_.__dict__["_trainer"] = None
    return copy_.eval()


_NO_TRAINER = object()


def batch_of_two(inputs: Any) -> tuple[Any, ...]:
    """Put inputs ``(N, …)`` into a tuple and repeat a batch of one, whose size would look as if it were broadcast."""
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    batched = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    if not batched or any(tensor.shape[0] != 1 for tensor in batched):
        return inputs
    return pytree.tree_map_only(Tensor, lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor, inputs)


def run(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Run a module without gradients.

    Raises:
        MergeError: If it fails.
    """
    try:
        with torch.no_grad():
            return module(*inputs)
    except Exception as error:
        raise MergeError(f"The module does not run on the example inputs: {_sentence(error)}") from error


def exported(module: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    """Trace a module into a graph in which the outputs of its parts and the inputs of its leaves are marked.

    Args:
        module: A module in evaluation mode; its hooks are removed afterwards.
        inputs: What it is called with.

    Raises:
        MergeError: If it cannot be traced.
    """
    handles = []
    for path, part in module.named_modules():
        if path:
            handles.append(part.register_forward_hook(_mark_output(path)))
            if not any(part.children()):
                handles.append(part.register_forward_pre_hook(_mark_input(path)))
    try:
        with unfused_attention(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _export(module, inputs)
    finally:
        for handle in handles:
            handle.remove()


def _export(module: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    _start_autograd()
    try:
        return torch.export.export(module, inputs, strict=False)
    except Exception as first:
        try:
            return torch.export.export(module, inputs, strict=True)
        except Exception:
            raise MergeError(
                f"torch.export cannot trace the module, so that its permutation groups cannot be found: "
                f"{_sentence(first)} {BY_HAND}"
            ) from first


def _start_autograd() -> None:
    """Run a first backward pass, so that this process can be forked and trained in its forks later (``ddp_fork``).

    Autograd starts a thread for every kind of device at its first pass, and an export adds kinds; before it, a machine
    without an accelerator has none.
    """
    with torch.enable_grad():
        torch.zeros((), requires_grad=True).sin().backward()


def decomposed(program: ExportedProgram) -> ExportedProgram | None:
    """Rewrite a graph with simpler operators: a recurrent layer as its steps; None if that fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return program.run_decompositions()
    except Exception:
        return None


def _sentence(error: Exception) -> str:
    """Take the first line of an error's message, as a sentence of 300 characters at most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0][:300] if lines else type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _mark_output(path: str) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return mark(output, path)
        if isinstance(output, tuple) and isinstance(output[0], Tensor) and all(other is None for other in output[1:]):
            return (mark(output[0], path), *output[1:])
        return None

    return hook


def _mark_input(path: str) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
        if args and isinstance(args[0], Tensor):
            return (mark(args[0], f"{path}:input"), *args[1:])
        return None

    return hook


def marks(program: ExportedProgram) -> set[str]:
    """Collect the names of the sites that are computed once, without inputs that are the output of a part."""
    marked = [node for node in program.graph.nodes if node.target is SITE]
    count = Counter(node.args[1] for node in marked)
    return {
        node.args[1]
        for node in marked
        if count[node.args[1]] == 1 and not (node.args[1].endswith(":input") and node.args[0].target is SITE)
    }
