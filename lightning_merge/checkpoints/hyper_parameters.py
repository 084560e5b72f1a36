"""Hyper-parameters that stand in a file: data, never a choice of code, of a place to load from, or of less safety.

Whoever shares a checkpoint writes its hyper-parameters. What a user says on the command line, in a config or in Python
may name any class of theirs; what a file says may not, see ``SECURITY.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_merge.utilities.nested import walk

OWN_MODELS = ("lightning_merge.Expert", "lightning_merge.models.Expert", "lightning_merge.models.expert.Expert")
"""The LightningModules of this package, which a file may name."""
OWN_BACKBONES = ("python/lightning_merge.models.vgg.VGG",)
"""The backbones of this package, which a file may name."""
UNSAFE = {
    "weights_only": False,
    "load_weights_only": False,
    "trust_remote_code": True,
    "allow_pickle": True,
    "use_safetensors": False,
}
"""Arguments that switch the safety of a loader off, and the value that does it."""
SAFE = "no loader's safety is switched off here, so leave it out, and save what it refuses to load as plain weights."
"""The rest of a sentence about an unsafe argument."""
LARGEST_NUMBER = 10_000_000
"""The largest number that a file may give for the size of something."""

_NAMED_BACKBONE = re.compile(r"(timm|open_clip)/\w[\w.\-]*")
_WORD = re.compile(r"\w[\w.\-+]*")
_CODE_KEYS = ("class_path", "_class_path", "_target_", "_partial_", "_instantiator")
_NAMES_A_PLACE = re.compile(r"url|path|file|dir|hub|cfg|cache|pretrained|weights|checkpoint|repo|token|jit|script|code")


def unsafe_arguments(content: Any) -> Iterator[str]:
    """Yield every argument, at any depth, that switches the safety of a loader off, like ``trust_remote_code=True``."""
    for key, value in walk(content):
        if isinstance(key, str) and key in UNSAFE and value is not None and bool(value) is UNSAFE[key]:
            yield f"{key}={value}"


def names_code(value: Any) -> bool:
    """Tell whether a hyper-parameter says which class or function is to be used."""
    return any(
        (isinstance(key, str) and key in _CODE_KEYS)
        or (isinstance(part, str) and part.startswith("python/") and part not in OWN_BACKBONES)
        for key, part in walk(value)
    )


def backbone_problem(backbone: Any) -> str | None:
    """Say why a file may not choose this backbone; None if it may: one of timm, open_clip or this package, by name."""
    if isinstance(backbone, str) and (backbone in OWN_BACKBONES or _NAMED_BACKBONE.fullmatch(backbone)):
        return None
    return (
        f"the backbone {backbone!r}, and a file may only name models that timm and open_clip list; if it is the right "
        "one, say so yourself: --model.backbone, or backbone=… in Python"
    )


def argument_problems(arguments: Any) -> list[str]:
    """Say which arguments of a backbone a file may not choose: all but numbers, words and lists of them.

    Args:
        arguments: ``backbone_args``.
    """
    if arguments is None:
        return []
    if not isinstance(arguments, Mapping):
        return [f"backbone_args of the type {type(arguments).__name__}; they are names with values"]
    return [
        f"backbone_args with {str(key)[:40]}={str(value)[:40]!r}, and a file may give numbers and plain words, and "
        "neither a place to load from nor code; if it is right, say so yourself: --model.backbone_args, or "
        "backbone_args=… in Python"
        for key, value in arguments.items()
        if not isinstance(key, str) or not _is_plain(value) or (not _is_number(value) and _NAMES_A_PLACE.search(key))
    ]


def without_code(hyper_parameters: Mapping[str, Any], said: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return those hyper-parameters of a file that can be handed on: none that its reader would have to refuse.

    Args:
        hyper_parameters: What the file says.
        said: What the user has said; where a file says the same, it stays.
    """
    said = said or {}
    kept = {
        key: value
        for key, value in hyper_parameters.items()
        if (key in said and same_value(said[key], value)) or _may_be_handed_on(key, value)
    }
    if isinstance(kept.get("pretrained"), str) and not _WORD.fullmatch(kept["pretrained"]):
        kept["pretrained"] = said.get("pretrained", False)
    if "backbone" in hyper_parameters:
        kept.pop("weights", None)  # the file that holds these hyper-parameters holds all weights
    if "backbone" not in kept:
        kept.pop("backbone_args", None)
    return kept


def same_value(one: Any, other: Any) -> bool:
    """Tell whether two hyper-parameters are the same, whatever they are."""
    try:
        return bool(type(one) is type(other) and one == other)
    except Exception:  # tensors of several entries, and whatever a class of the user's makes of `==`
        return False


def _may_be_handed_on(key: str, value: Any) -> bool:
    if key == "_class_path":
        return value in OWN_MODELS
    if key in _CODE_KEYS or key in UNSAFE or names_code(value) or any(unsafe_arguments(value)):
        return False
    if key == "backbone" and isinstance(value, str):
        return backbone_problem(value) is None or "/" not in value
    return not (key == "backbone_args" and argument_problems(value))


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    if isinstance(value, (list, tuple)):
        return len(value) <= 1000 and all(map(_is_plain, value))
    if value is None or isinstance(value, bool):
        return True
    return _is_number(value) and abs(value) <= LARGEST_NUMBER


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
