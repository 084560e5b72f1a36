"""What an ``adapter_config.json`` of peft says of a LoRA adapter, as far as the weights depend on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_merge.checkpoints.patterns import Patterns
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.schemas import load_json

CONFIG = "adapter_config.json"
"""The name of the file."""
WITH_PEFT = "merge it into its base with peft (model.merge_and_unload()) and give that model as the expert"
"""What to do with an adapter that peft can merge and this package cannot."""

_LEFT_OUT = "no weights give the same model, and peft merges none either; leave this expert out"
_REFUSED = {
    "alora_invocation_tokens": f"it is active only after these tokens (aLoRA), so that {_LEFT_OUT}",
    "arrow_config": f"it routes every token to experts of its own (Arrow), so that {_LEFT_OUT}",
    "layer_replication": "its model has other layers than the base; leave this expert out",
    "use_qalora": f"its factors act on pooled inputs of a quantized base (QALoRA), so that {_LEFT_OUT}",
    "kasa_config": f"its change is not B·A (KaSA); {WITH_PEFT}",
    "monteclora_config": f"its change is not B·A (MonteCLoRA); {WITH_PEFT}",
    "target_parameters": f"it adapts parameters of which the files do not say how they are laid out; {WITH_PEFT}",
    "use_bdlora": f"its factors are stored as blocks (BD-LoRA); {WITH_PEFT}",
    "velora_config": f"its files hold more than B and A (VeLoRA); {WITH_PEFT}",
}
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_bias",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
"""Fields that say how an adapter was made or trained, or what its tensors say as well."""

_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initialisations that take something off the base
_PATTERNS = ("rank_pattern", "alpha_pattern")
_INITIALISATIONS = ("none", "true", "false", "gaussian", "eva", "orthogonal", "mica")  # those that do not


@dataclass(frozen=True)
class AdapterConfig:
    """Configuration of a LoRA adapter, under peft's names: what its weights depend on.

    Args:
        r: The rank of the factors.
        lora_alpha: The scaling times the rank (or its root).
        rank_pattern: Other ranks, by patterns of modules' names.
        alpha_pattern: Other values of ``lora_alpha``, likewise.
        use_rslora: Whether the scaling is divided by the root of the rank.
        use_dora: Whether the norms of the changed weights are stored beside the factors.
        fan_in_fan_out: Whether the last of the adapted layers stores its weight as ``(in, out)``.
        trainable_token_indices: The rows of embeddings that were trained by themselves; of every embedding, or by name.
    """

    r: int
    lora_alpha: float
    rank_pattern: Patterns
    alpha_pattern: Patterns
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    trainable_token_indices: list[int] | Mapping[str, list[int]] | None = None

    def rank(self, module: str) -> int:
        """Look up the rank of a module's factors."""
        return int(self.rank_pattern.find(module, self.r))

    def scaling(self, module: str) -> float:
        """Compute the coefficient of a module's product ``B A``."""
        rank = self.rank(module)
        alpha = float(self.alpha_pattern.find(module, self.lora_alpha))
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def tokens(self, module: str) -> list[int]:
        """List the rows of an embedding that were trained by themselves."""
        indices = self.trainable_token_indices
        if isinstance(indices, Mapping):
            return next((rows for key, rows in indices.items() if f".{module}".endswith(f".{key}")), [])
        return indices or []


def read_config(folder: Path, name: str) -> AdapterConfig:
    """Read the configuration of an adapter.

    Args:
        folder: Holds ``adapter_config.json``.
        name: What to call the adapter in messages.

    Raises:
        MergeError: If it cannot be read, or is not that of a LoRA that can be turned into dense weights.
    """
    file = folder / CONFIG
    try:
        content = load_json(file.read_bytes())
    except OSError as error:
        raise MergeError(f"There is no {file}; give the folder that peft's save_pretrained wrote.") from error
    except ValueError as error:
        raise MergeError(f"{file} is no readable JSON: {error}.") from error
    if not isinstance(content, dict):
        raise MergeError(f"{file} is no configuration of peft; give the folder that peft's save_pretrained wrote.")
    if content.get("peft_type") != "LORA":
        raise MergeError(
            f"The adapter {name} is of type {content.get('peft_type')}; only LORA can be turned into dense weights "
            f"here. If peft can merge it, {WITH_PEFT}."
        )
    given = {key: value for key, value in content.items() if not (value is False or value in (None, "", [], {}))}
    raise_all([*_unsupported(given, name), *_malformed(given, file)])
    patterns = {key: Patterns(given.get(key, {}), f"the {key} of the adapter {name}") for key in _PATTERNS}
    return AdapterConfig(**({key: given[key] for key in _READ if key in given} | patterns))


def _unsupported(given: Mapping[str, Any], name: str) -> list[str]:
    """List the fields that make of an adapter something else than a LoRA over the base, a sentence each."""
    problems = [f"The adapter {name} sets {key}: {why}." for key, why in _REFUSED.items() if key in given]
    initialisation = str(given.get("init_lora_weights")).lower()
    if initialisation.startswith(_CHANGES_BASE):
        problems.append(
            f"The adapter {name} was initialised by {initialisation}, which changes the base, too; save it again with "
            "peft's path_initial_model_for_weight_conversion, which makes it an adapter over the original base."
        )
    elif initialisation not in _INITIALISATIONS:
        problems.append(
            f"The adapter {name} was initialised by {initialisation}, of which this version of lightning_merge does "
            f"not know whether it changes the base; {WITH_PEFT}."
        )
    return problems + [
        f"The adapter {name} sets {key}, which this version of lightning_merge does not know; {WITH_PEFT}."
        for key, value in given.items()
        if value != 0 and key not in _KNOWN
    ]


def _malformed(given: Mapping[str, Any], file: Path) -> list[str]:
    """List the fields that have no value of their kind, or none where there must be one, a sentence each."""
    missing = [key for key in ("r", "lora_alpha") if key not in given]
    problems = [f"{file} does not say {' and '.join(missing)}; add what the adapter was trained with."] * bool(missing)
    problems += [
        f"{file} gives {key} as {str(given[key])[:100]!r}, which is not {what}; give the file that peft wrote."
        for key, (is_valid, what) in _READ.items()
        if key in given and not is_valid(given[key])
    ]
    return problems


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(type(row) is int and row >= 0 for row in value)


def _values(are_valid: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, dict) and all(map(are_valid, value.values()))


_READ: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a rank r of at least 1"),
    "lora_alpha": (_is_number, "a number"),
    "rank_pattern": (lambda value: _values(_is_rank, value), "a mapping from patterns to ranks"),
    "alpha_pattern": (lambda value: _values(_is_number, value), "a mapping from patterns to numbers"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),
    "trainable_token_indices": (
        lambda value: _is_rows(value) or _values(_is_rows, value),
        "a list of rows, or one for each embedding",
    ),
}
"""What the weights depend on: whether a value is of its kind, and what that is."""
_KNOWN = {"peft_type", "init_lora_weights", *_HARMLESS, *_REFUSED, *_READ}
