"""What ``--ckpt_path`` says of the model, for ``fit``, ``validate``, ``test`` and ``predict``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lightning_merge.checkpoints.torch_format import load_plain
from lightning_merge.models.from_file import class_problem, expert_arguments, plain_hyper_parameters
from lightning_merge.utilities.errors import MergeError, raise_all


def model_of_checkpoint(
    path: str, said: Mapping[str, Any], model_class: Any, subclasses: bool
) -> dict[str, Any] | None:
    """Return what a checkpoint adds to the config of the model; None if it says nothing.

    Args:
        path: The checkpoint.
        said: The model in the config that the user has given, which alone may name code.
        model_class: The class that the command line was made for.
        subclasses: Whether the user may name a class that extends it.

    Raises:
        MergeError: If the checkpoint names code, a place to load from, or less safety, and the user does not.
    """
    content = load_plain(path, "meta")
    stated = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    if not stated:
        return None
    if not isinstance(stated, Mapping):
        raise MergeError(f"The hyper_parameters in {path} are a {type(stated).__name__}, not names with values.")
    stated = dict(stated)
    stated.pop("_instantiator", None)
    named = stated.pop("_class_path", None)
    model = _class_of(said.get("class_path")) if subclasses else model_class
    raise_all(class_problem(path, named, model if isinstance(model, type) else None))
    if subclasses:
        said = said.get("init_args") or {}
    if model is None and named is None:
        return None
    arguments = _arguments(path, stated, said, model)
    if not subclasses:
        return arguments
    path_of_class = named if model is None else f"{model.__module__}.{model.__qualname__}"
    return {"class_path": path_of_class, "dict_kwargs": arguments}


def _arguments(path: str, stated: Mapping[str, Any], said: Mapping[str, Any], model: Any) -> dict[str, Any]:
    from lightning_merge.models import Expert

    if model is None:
        model = Expert
    if isinstance(model, type) and issubclass(model, Expert):
        return expert_arguments(path, stated, said, model)
    return plain_hyper_parameters(path, stated, said)


def _class_of(path: str | None) -> type | None:
    """Return the class that the user has named, which the parser has imported."""
    module, _, name = (path or "").rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if path and not isinstance(found, type):
        raise MergeError(f"The model {path} is no class; with --ckpt_path name the class of the LightningModule.")
    return found
