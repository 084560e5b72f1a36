"""What a file of torch holds besides its weights, and which weights, where it holds several sets of them."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_merge.checkpoints.hyper_parameters import names_code, unsafe_arguments, without_code
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.checkpoints.recognition import find_state, states_within
from lightning_merge.utilities.errors import MergeError

STATE = "state_dict"
"""The key of a checkpoint's weights."""
MARK = "#"
"""What stands between a file and the set of weights in it: ``file.ckpt#state_dict_ema``."""

_NO_WEIGHTS = ("loops", "optimizer_states", "lr_schedulers", "optimizer", "optimizer_state_dict", "scheduler")
_OF_THE_RUN = (
    *_NO_WEIGHTS,
    *("epoch", "global_step", "pytorch-lightning_version", "callbacks", "hparams_type", "datamodule_hparams_type"),
    *("MixedPrecision", "MixedPrecisionPlugin", "lr_scheduler", "scaler", "amp_scaler", "averaging_state"),
)
"""The state of a run, which means nothing to a model that was merged of several."""
_DEEPEST = 4  # how many keys may lead to a set of weights


@dataclass(frozen=True)
class Beside:
    """The contents of a checkpoint besides its tensors and hyper-parameters.

    Args:
        keys: What stands beside its state dict: what the module's ``on_save_checkpoint`` has added, the arguments of
            the data module.
        state: What stands in its state dict and is no tensor, such as ``_extra_state``.
        left_out: What was left out because it names code: ``hyper_parameters.backbone``.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    left_out: Sequence[str] = ()


def split_source(source: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """Split ``file.ckpt#state_dict_ema`` into the file and the set of weights in it; None where none is named."""
    path = local_path(source)
    before, mark, part = str(path).rpartition(MARK)
    return (Path(before), part) if mark and not os.path.lexists(path) else (path, None)


def choose_state(
    path: Path, content: Mapping[Any, Any], part: str | None
) -> tuple[Mapping[Any, Any], str, tuple[str, ...]]:
    """Choose a set of weights of a file, by default its ``state_dict``, else the only one there is.

    Args:
        path: The file.
        content: What it holds.
        part: The keys that lead to the set, with ``/`` between them, as in ``callbacks/EMA/weights``.

    Returns:
        The set; the keys that lead to it, none if it is all of the file; and what leads to the others, which have its
        shapes: averaged weights, those before averaging.

    Raises:
        MergeError: If it holds no such set, or if it holds several and none was chosen.
    """
    states = {"/".join(keys): state for keys, state in states_within(content)}
    if part is None or part not in states:
        state = find_state(path, content) if part is None or STATE in content or not states else {}
        place = next((name for name, value in states.items() if value is state), "")
        sets = {place: state, **dict(_other_sets(content, state))} if place else states
    else:
        sets = states | dict(_other_sets(content, states[part]))
    if part is None:
        return state, place, tuple(name for name in sets if name != place)
    if part not in sets:
        known = f"it holds {', '.join(sets)}" if sets else f"it is a state dict itself: leave {MARK}{part} out"
        raise MergeError(f"{path} holds no set of weights {part!r}; {known}.")
    return sets[part], part, tuple(name for name in sets if name != part)


def header_of(
    content: Mapping[Any, Any],
    state: Mapping[Any, Any],
    place: str = "",
    others: Sequence[str] = (),
    part: str | None = None,
) -> dict[str, Any]:
    """Collect what a file holds besides a state dict's tensors, but for other sets of weights.

    Returns:
        ``hyper_parameters`` and ``merge`` (a manifest) as they stand there; what else is ``beside`` the state dict, and
        the ``extra_state`` in it, by key; the names of the ``others``, and that of the ``part`` that was asked for.
        What there is none of is left out.
    """
    whole = {} if state is content else content
    header = {key: content[key] for key in ("hyper_parameters", "merge") if key in content}
    sets = {name.partition("/")[0] for name in (*others, place)}
    left = {*header, *_OF_THE_RUN, *sets}
    more = {
        "beside": {key: value for key, value in whole.items() if isinstance(key, str) and key not in left},
        "extra_state": {
            key.replace("_orig_mod.", ""): value
            for key, value in state.items()
            if isinstance(key, str) and not isinstance(value, Tensor) and key not in header
        },
        "others": list(others),
        "part": part,
    }
    return header | {key: value for key, value in more.items() if value}


def keep_beside(
    headers: Sequence[Mapping[str, Any]], said: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Beside]:
    """Choose what a merged checkpoint holds besides its tensors: what the first model's file does, else the second's.

    What names code is left out: a file may not choose it, so that the merged one would be refused.

    Args:
        headers: That of the base's file and that of the first expert's.
        said: The hyper-parameters that the user has said, which a file may repeat.

    Returns:
        The hyper-parameters, and the rest.
    """
    stated: dict[str, Any] = {}
    for header in headers:
        found = {"hyper_parameters": header.get("hyper_parameters"), **header.get("beside", {})}
        taken = set(map(_group, stated))
        stated |= {key: value for key, value in found.items() if value is not None and _group(key) not in taken}
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    for key, value in stated.items():
        if _group(key) == key and key.endswith("hyper_parameters") and isinstance(value, Mapping):
            kept[key] = without_code(value, said if key == "hyper_parameters" else None)
            expected = {*kept[key], "weights"} if "backbone" in value else kept[key]  # see without_code
            left_out += [f"{key}.{name}" for name in value if name not in expected]
        elif names_code({key: value}) or any(unsafe_arguments({key: value})):
            left_out.append(key)
        else:
            kept[key] = value
    state: Mapping[str, Any] = next((header["extra_state"] for header in headers if "extra_state" in header), {})
    return kept.pop("hyper_parameters", {}), Beside(kept, state, left_out)


def _group(key: str) -> str:
    """Return the key of the hyper-parameters to which their name belongs; every other key stands for itself."""
    return key.replace("hparams_name", "hyper_parameters")


def _other_sets(content: Mapping[Any, Any], state: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield other sets of weights, with most of this one's shapes, and the keys that lead to them."""
    wanted = Counter(_shapes(state)) if isinstance(state, Mapping) else Counter()
    waiting = deque([("", content, _DEEPEST)])
    seen = {id(state)}
    while waiting:
        place, value, levels = waiting.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        shapes = Counter(_shapes(value))
        alike = (shapes & wanted).total()
        if place and alike and 2 * alike >= wanted.total() and 10 * alike >= 9 * shapes.total():
            yield place, value
        elif levels:
            waiting += [
                (f"{place}/{key}" if place else key, part, levels - 1)
                for key, part in value.items()
                if isinstance(key, str) and isinstance(part, Mapping) and key not in _NO_WEIGHTS
            ]


def _shapes(state: Mapping[Any, Any]) -> Iterator[tuple[int, ...]]:
    return (tuple(value.shape) for value in state.values() if isinstance(value, Tensor))
