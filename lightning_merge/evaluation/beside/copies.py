"""A copy of a LightningModule that has other weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import CellType
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

from lightning_merge.checkpoints.weights import plain_names
from lightning_merge.utilities.errors import MergeError

_NOT_COPIED = (DataLoader, Dataset, LightningDataModule, Logger, Trainer)
"""What a module may point to, and all of its copies share."""
_COMPILED = ("forward", "training_step", "validation_step", "test_step", "predict_step")
"""The methods that Lightning replaces in a module that was compiled; what it puts there runs the original's weights."""


def copy_with_weights(module: LightningModule, weights: Mapping[str, Tensor]) -> LightningModule:
    """Copy a module as it is at this moment, modes included, but with other weights, which are not copied.

    Weights that are tied in the module stay tied. Data sets, loaders and loggers are shared with the original.

    Args:
        module: The original, which is not changed.
        weights: All of its weights, with its shapes ``(…)``, by name, without what ``torch.compile`` puts into names.
            They are moved to the module's device and dtype.

    Raises:
        MergeError: If an attribute of the module cannot be copied, or is a function that holds on to its layers.
    """
    _check_functions(module)
    twin = object.__new__(type(module))
    memo: dict[int, Any] = {id(module): twin}
    for part in module.modules():
        for leaf in tree_leaves(vars(part)):
            if isinstance(leaf, _NOT_COPIED):
                memo[id(leaf)] = leaf
            elif isinstance(leaf, Tensor) and not leaf.is_leaf:
                memo[id(leaf)] = leaf.detach().clone()
    tensors = {key: value for key, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    for plain, key in plain_names("the module", tensors).items():
        memo[id(tensors[key])] = _like(tensors[key], weights[plain])
    state = {}
    for name, value in _state(module).items():
        try:
            state[name] = copy.deepcopy(value, memo)
        except Exception as error:
            raise MergeError(
                f"Other weights are evaluated in copies of {type(module).__name__}, and its attribute {name!r} cannot "
                f"be copied ({error}); give the attribute's class a method __deepcopy__."
            ) from error
    twin.__setstate__(state)
    for metric in (part for part in twin.modules() if isinstance(part, Metric)):
        metric.reset()
    return twin


def _check_functions(module: LightningModule) -> None:
    """Raise a :class:`MergeError` if a function in an attribute would run the original's layers in a copy."""
    for part in (part for part in module.modules() if not isinstance(part, Metric)):  # a metric makes them anew
        for name, value in vars(part).items():
            if name in _COMPILED or not any(map(_holds_weights, getattr(value, "__closure__", None) or ())):
                continue
            raise MergeError(
                f"Other weights are evaluated in copies of {type(module).__name__}, and the function in the attribute "
                f"{name!r} of {type(part).__name__} would still use the original's; make it a method."
            )


def _holds_weights(cell: CellType) -> bool:
    """Tell whether a variable of a closure is a module or a tensor."""
    try:
        return isinstance(cell.cell_contents, (nn.Module, Tensor))
    except ValueError:  # it is empty
        return False


def _like(original: Tensor, weight: Tensor) -> Tensor:
    """Turn a weight ``(…)`` into a parameter or a buffer, as the original is, of its device and dtype."""
    weight = weight.detach().to(original.device, original.dtype)
    return nn.Parameter(weight, requires_grad=False) if isinstance(original, nn.Parameter) else weight.clone()


def _state(module: LightningModule) -> dict[str, Any]:
    """Return the attributes of a module, without its trainer and without what compiling it has put there."""
    state = dict(module.__getstate__())
    state.pop("_compiled_call_impl", None)
    if state.get("_compiler_ctx") is not None:
        state = {name: value for name, value in state.items() if name not in _COMPILED} | {"_compiler_ctx": None}
    return state
