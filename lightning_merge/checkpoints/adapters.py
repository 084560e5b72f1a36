"""LoRA experts as peft writes them: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch

from lightning_merge.checkpoints.differences import Difference, Product
from lightning_merge.checkpoints.reading import Source, open_weights
from lightning_merge.checkpoints.weights import Weights
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.tensors import wide

_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initialisations that take something off the base


def is_adapter(source: Source) -> TypeGuard[str | os.PathLike[str]]:
    """Tell whether a source is a folder that peft has written."""
    return isinstance(source, (str, os.PathLike)) and (Path(source).expanduser() / _CONFIG).is_file()


def open_adapter(
    folder: str | os.PathLike[str], base: Source, *, name: str | None = None, prefix: str = ""
) -> Difference:
    """Open a LoRA adapter as the expert it makes of its base.

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
        MergeError: If there is no such adapter, if it is not a plain LoRA, or if it does not fit the base.
    """
    folder = Path(folder).expanduser()
    name = name or str(folder)
    config = _read_config(folder, name)
    origin = open_weights(base)
    file = next((folder / file for file in _FILES if (folder / file).is_file()), None)
    if file is None:
        raise MergeError(f"The adapter {name} has no weights; its folder should hold {_FILES[0]}.")
    adapter = open_weights(file, name)

    factors, replaced, problems = _sort_keys(adapter, name, prefix)
    problems += [
        f"The adapter {name} adapts {parameter!r}, which the base {origin.name} lacks; give the base that it was "
        f"trained on, or open it by lightning_merge.checkpoints.open_adapter with what stands before the names there "
        f"as its `prefix` (they look like {next(iter(origin))!r})."
        for parameter in (*factors, *replaced)
        if parameter not in origin
    ]
    problems += [
        f"The adapter {name} holds only one of the two factors of {parameter!r}."
        for parameter, keys in factors.items()
        if keys.keys() != {"A", "B"}
    ]
    raise_all(problems)
    adapted = {}
    for parameter, keys in factors.items():
        module = parameter.removeprefix(prefix).removesuffix(".weight")
        rank = int(_by_pattern(config.get("rank_pattern"), module, config["r"]))
        alpha = float(_by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
        adapted[parameter] = Product(
            A=partial(adapter.__getitem__, keys["A"]),
            B=partial(adapter.__getitem__, keys["B"]),
            scaling=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
            transposed=bool(config.get("fan_in_fan_out")) or "lora_embedding_" in keys["A"],
        )
        A, B, shape = adapter.meta[keys["A"]].shape, adapter.meta[keys["B"]].shape, origin.meta[parameter].shape
        if A[0] != rank or B[1] != rank:
            conflict = f"which is not the rank {rank} that its {_CONFIG} says."
        elif _product_shape(A, B, adapted[parameter].transposed) != shape:
            conflict = f"which does not fit the base's {tuple(shape)}; give the base that it was trained on."
        else:
            continue
        problems.append(f"The adapter {name} has factors {tuple(A)} and {tuple(B)} of {parameter!r}, {conflict}")
    problems += [
        f"{parameter!r} has shape {tuple(adapter.meta[key].shape)} in the adapter {name} and "
        f"{tuple(origin.meta[parameter].shape)} in the base; give the base that it was trained on."
        for parameter, key in replaced.items()
        if adapter.meta[key].shape != origin.meta[parameter].shape
    ]
    raise_all(problems)
    replaced = {  # peft also saves the embedding below an adapted embedding
        parameter: key
        for parameter, key in replaced.items()
        if parameter not in adapted or not torch.equal(wide(adapter[key]), wide(origin[parameter]).cpu())
    }
    changed = {*adapted, *replaced}
    tied = {alias: owner for alias, owner in origin.tied.items() if not {alias, owner} & changed}
    return Difference(name, adapter, origin, adapted, replaced, tied=tied)


def _sort_keys(adapter: Weights, name: str, prefix: str) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """Sort the adapter's tensors into factors and weights that were trained as a whole.

    Returns:
        ``{parameter: {"A": key, "B": key}}``, ``{parameter: key}`` of what was trained as a whole, and the problems.
    """
    factors: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    problems = []
    for key in adapter:
        stem = key.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if match := re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?", stem):
            factors.setdefault(f"{prefix}{match[1]}.weight", {})[match[2]] = key
        elif "lora_" in stem:
            problems.append(f"The adapter {name} holds {key!r}, which a plain LoRA does not have.")
        else:
            replaced[prefix + stem] = key
    return factors, replaced, problems


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    """Read the adapter's configuration.

    Raises:
        MergeError: If it cannot be read, or is not that of a plain LoRA.
    """
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise MergeError(
            f"There is no {folder / _CONFIG}; give the folder that peft's save_pretrained wrote."
        ) from error
    except ValueError as error:
        raise MergeError(f"{folder / _CONFIG} is no readable JSON: {error}.") from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise MergeError(f"The adapter {name} is of type {kind}; only LORA can be turned into dense weights here.")
    if config.get("use_dora"):
        raise MergeError(
            f"The adapter {name} is a DoRA, whose change is not B·A; merge it into its base with peft first."
        )
    initialisation = str(config.get("init_lora_weights")).lower()
    if initialisation.startswith(_CHANGES_BASE):
        raise MergeError(
            f"The adapter {name} was initialised by {initialisation}, which changes the base, too; save it again with "
            "peft's path_initial_model_for_weight_conversion, which makes it an adapter over the original base."
        )
    missing = [key for key in ("r", "lora_alpha") if not isinstance(config.get(key), (int, float))]
    if missing or config["r"] < 1:
        raise MergeError(f"{folder / _CONFIG} does not say {' and '.join(missing) or 'a rank r of at least 1'}.")
    return config


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Look up a module's value by the first pattern that matches the end of its name, as peft does."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _product_shape(A: torch.Size, B: torch.Size, transposed: bool) -> torch.Size:
    if transposed:
        return torch.Size([A[1], B[0]])
    return torch.Size([B[0], *A[1:]])
