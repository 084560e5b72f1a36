"""Build an expert from what a checkpoint says of it, and let the checkpoint choose no code."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import IO, Any

from lightning_merge.checkpoints.hyper_parameters import (
    LARGEST_NUMBER,
    OWN_MODELS,
    argument_problems,
    backbone_problem,
    names_code,
    same_value,
    unsafe_arguments,
)
from lightning_merge.checkpoints.torch_format import load_plain
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.schemas import read_yaml


def load_checkpoint(source: str | os.PathLike[str] | IO[bytes], map_location: Any) -> dict[str, Any]:
    """Load a whole checkpoint of Lightning, running no code.

    Raises:
        MergeError: If it cannot be read, or holds no weights.
    """
    content = load_plain(source, map_location)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise MergeError(f"{source} is no checkpoint of Lightning: it has no state_dict; open it with lm.open_weights.")
    if not isinstance(content.get("hyper_parameters", {}), Mapping):
        raise MergeError(f"The hyper_parameters in {source} are a {type(content['hyper_parameters']).__name__}.")
    return content


def read_hyper_parameters(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read hyper-parameters from a YAML file, like Lightning's ``hparams.yaml``.

    Raises:
        MergeError: If there is no such file, or if it holds something else.
    """
    try:
        content = read_yaml(Path(path))
    except ValueError as error:
        raise MergeError(f"The hyper-parameters in {path} cannot be read: {error}") from error
    if not isinstance(content, Mapping):
        raise MergeError(f"{path} holds a {type(content).__name__}, not names with values; is it hparams.yaml?")
    return content


def class_problem(path: Any, named: Any, model: type | None) -> list[str]:
    """Say that a checkpoint may not choose the class of its model; nothing if it names the one that the user has named.

    Args:
        path: The checkpoint.
        named: The class that it names, as text; None if it names none.
        model: The class that the user has named; None if they left the choice to the checkpoint.
    """
    said = None if model is None else f"{model.__module__}.{model.__qualname__}"
    if named is None or named == said or (named in OWN_MODELS and said in (None, *OWN_MODELS)):
        return []
    instead = f"--model {named}, or {named}.load_from_checkpoint(…) in Python" if len(str(named)) <= 80 else "--model"
    return [
        f"{path} says that its model is {_shown(named)}, and a file may not choose which code runs; if that is right, "
        f"say so yourself: {instead}."
    ]


def plain_hyper_parameters(path: Any, hyper_parameters: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a checkpoint for a class of the user's.

    Args:
        path: The checkpoint, for messages.
        hyper_parameters: What it says.
        said: What the user says.

    Raises:
        MergeError: If the checkpoint names code or less safety that the user does not name.
    """
    problems = []
    for key, value in hyper_parameters.items():
        if key in said and same_value(said[key], value):
            continue
        problems += [
            f"{path} asks for {argument}, which a file may not." for argument in unsafe_arguments({key: value})
        ]
        if names_code(value) or _is_import_path(value):
            problems.append(
                f"{path} says that {key} is {_shown(value)}, and a file may not choose which code runs; if that is "
                f"right, say so yourself: --model.{key}, or {key}=… in Python."
            )
    raise_all(problems)
    return dict(hyper_parameters)


def expert_arguments(
    path: Any, hyper_parameters: Mapping[str, Any], said: Mapping[str, Any], model: type
) -> dict[str, Any]:
    """Return the arguments with which to build the expert of a checkpoint, whose weights are loaded afterwards.

    Args:
        path: The checkpoint, for messages.
        hyper_parameters: What it says.
        said: What the user says, which may name code.
        model: :class:`lightning_merge.models.Expert`, or a class of the user's that extends it.

    Raises:
        MergeError: If the checkpoint chooses code, a place to load from, or less safety, and the user does not.
    """
    known = _parameters(model)
    stated = {
        key: value
        for key, value in hyper_parameters.items()
        if key in known and not (key in said and same_value(said[key], value))
    }
    problems = [f"{path} asks for {argument}, which a file may not." for argument in unsafe_arguments(stated)]
    if "backbone" in stated and (problem := backbone_problem(stated["backbone"])):
        problems.append(f"{path} names {problem}.")
    problems += [f"{path} names {problem}." for problem in argument_problems(stated.get("backbone_args"))]
    for key, value in stated.items():
        if key not in ("backbone", "backbone_args") and names_code(value):
            problems.append(f"{path} says that {key} is {_shown(value)}, and a file may not choose which code runs.")
    classes = stated.get("num_classes")
    if classes is not None and not (isinstance(classes, int) and 0 < classes <= LARGEST_NUMBER):
        problems.append(f"{path} says that num_classes is {_shown(classes)}; it is a number up to {LARGEST_NUMBER:,}.")
    if "backbone" not in hyper_parameters and "backbone" not in said:
        problems.append(
            f"{path} does not say which backbone it is of; say so yourself: --model.backbone, or backbone=… in Python."
        )
    raise_all(problems)
    # Every weight stands in the checkpoint: nothing is loaded from anywhere else. A tag of open_clip also says how
    # images are prepared.
    if "pretrained" in stated and not _is_tag(hyper_parameters.get("backbone"), stated["pretrained"]):
        stated["pretrained"] = False
    if "weights" in stated:
        stated["weights"] = None
    return stated


def _parameters(model: type) -> set[str]:
    """Return the names of the parameters of a class and, where it hands further ones on, of those it extends."""
    names: set[str] = set()
    for kind in model.__mro__:
        if "__init__" in vars(kind):
            parameters = inspect.signature(vars(kind)["__init__"]).parameters
            names |= set(parameters)
            if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
    return names - {"self"}


def _is_tag(backbone: Any, pretrained: Any) -> bool:
    """Tell whether open_clip lists these weights for a model."""
    library, _, name = str(backbone).partition("/")
    if library != "open_clip" or not isinstance(pretrained, str):
        return False
    import open_clip

    return pretrained in open_clip.list_pretrained_tags_by_model(name)


def _is_import_path(value: Any) -> bool:
    """Tell whether a text names something in a package that is installed here, as ``os.system`` does."""
    if not isinstance(value, str) or not all(part.isidentifier() for part in value.split(".")) or "." not in value:
        return False
    package = value.partition(".")[0]
    return package in sys.modules or package in sys.builtin_module_names or PathFinder.find_spec(package) is not None


def _shown(value: Any) -> str:
    text = str(value)
    return repr(text if len(text) <= 80 else text[:79] + "…")
