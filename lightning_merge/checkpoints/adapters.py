"""LoRA experts as peft writes them: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TypeGuard

import torch

from lightning_merge.checkpoints.adapter_config import CONFIG, read_config
from lightning_merge.checkpoints.adapter_tensors import AdapterTensors, find_misfits, find_transposed, sort_tensors
from lightning_merge.checkpoints.differences import Change, Decomposed, Dense, Difference, Product, Rows
from lightning_merge.checkpoints.model_config import read_model_config
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.checkpoints.reading import Source, open_weights
from lightning_merge.checkpoints.remote import fetch, is_there
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.tensors import wide

_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def is_adapter(source: Source) -> TypeGuard[str | os.PathLike[str]]:
    """Tell whether a source is a folder that peft has written."""
    return isinstance(source, (str, os.PathLike)) and is_there(local_path(source) / CONFIG)


def open_adapter(
    folder: str | os.PathLike[str], base: Source, *, name: str | None = None, prefix: str = ""
) -> Difference:
    """Open a LoRA adapter as the expert it makes of its base.

    What peft adds to a plain LoRA is followed where it can be written as weights: rank-stabilised and DoRA adapters,
    biases, modules trained as a whole, single rows of an embedding. Anything else is refused by name.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).
        base: The model that the adapter was trained on.
        name: What to call this expert in messages; by default the folder.
        prefix: What the base's names have in front of the adapter's (``model.`` where the base is the checkpoint of a
            LightningModule and the adapter that of its ``self.model``).

    Returns:
        All parameters of the base, the adapted ones ``(out, in)`` with ``scaling · B A`` added; at least float32, so
        that small changes are not rounded away.

    Raises:
        MergeError: If there is no such adapter, if no dense weights are the same, or if it does not fit the base.
    """
    folder = fetch(folder, [[file] for file in _FILES])
    name = name or str(folder)
    config = read_config(folder, name)
    origin = open_weights(base)
    file = next((folder / file for file in _FILES if (folder / file).is_file()), None)
    if file is None:
        raise MergeError(f"The adapter {name} has no weights; its folder should hold {_FILES[0]}.")
    model = read_model_config(origin)
    adapter = sort_tensors(name, config, open_weights(file, name), origin, prefix, model)
    transposed = find_transposed(adapter, model)
    raise_all([*find_misfits(adapter, transposed)])
    own = _replaced(adapter)
    changes = {key: change for module in adapter.modules for key, change in _changes(adapter, module, transposed, own)}
    changed = {*own, *(key for key, change in changes.items() if not isinstance(change, Rows))}  # rows stay tied
    tied = {alias: owner for alias, owner in origin.tied.items() if not {alias, owner} & changed}
    changes = {tied.get(key, key): change for key, change in changes.items()}
    return Difference(name, adapter.stored, origin, changes, own, tied=tied)


def _replaced(adapter: AdapterTensors) -> dict[str, str]:
    """Find what was trained as a whole, ``{parameter: key}``: peft also saves the embedding below an adapted one."""
    return {
        parameter: key
        for parameter, key in adapter.replaced.items()
        if parameter.removesuffix(".weight") not in adapter.modules
        or not torch.equal(wide(adapter.stored[key]), wide(adapter.origin[parameter]).cpu())
    }


def _changes(
    adapter: AdapterTensors, module: str, transposed: Mapping[str, bool], own: Mapping[str, str]
) -> Iterator[tuple[str, Change]]:
    """Yield what the adapter changes of a module: the parameters and their changes.

    Args:
        adapter: The adapter.
        module: The module.
        transposed: Whether the weight of a module is the transpose of the product.
        own: What was trained as a whole: ``{parameter: key}``.
    """
    parameter, parts, stored = f"{module}.weight", adapter.modules[module], adapter.stored
    home, key = (stored, own[parameter]) if parameter in own else (adapter.origin, parameter)
    before = partial(home.__getitem__, key)
    read = {part: partial(stored.__getitem__, key) for part, key in parts.items()}
    if "tokens" in parts:
        yield parameter, Rows(read["tokens"], before, adapter.config.tokens(adapter.own_name(module)))
        return
    scaling = adapter.config.scaling(adapter.own_name(module))
    product = Product(read["A"], read["B"], scaling, transposed[module])
    yield parameter, Decomposed(product, read["magnitude"], before) if "magnitude" in parts else product
    if "bias" in parts:
        yield f"{module}.bias", Dense(read["bias"], scaling)
