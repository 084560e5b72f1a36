"""Corrections of a model's activations: a scale and a shift for every channel of some sites."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from lightning_merge.checkpoints import save_tensors
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.checkpoints.remote import fetch
from lightning_merge.checkpoints.safetensors_format import read_header
from lightning_merge.repair.calibration import Goals
from lightning_merge.repair.moments import Moments
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.modules import plain
from lightning_merge.utilities.schemas import check_schema, load_json, shown
from lightning_merge.utilities.sites import Site, at_sites


@dataclass(frozen=True)
class Correction:
    """An affine correction of the activations at some sites: ``scale · x + shift``.

    Args:
        scale: By site, ``(channels,)``.
        shift: By site, ``(channels,)``; of the same sites.
    """

    scale: Mapping[Site, Tensor] = field(default_factory=dict)
    shift: Mapping[Site, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [
            site.name
            for site in {*self.scale, *self.shift}
            if site not in self.scale or site not in self.shift or self.scale[site].shape != self.shift[site].shape
        ]
        raise_all([f"The correction of {name} needs a scale and a shift of the same shape." for name in sorted(wrong)])

    def __len__(self) -> int:
        return len(self.scale)

    @property
    def sites(self) -> list[Site]:
        """The sites."""
        return list(self.scale)

    @property
    def state(self) -> dict[str, Tensor]:
        """The entries of these sites in the state of a module into which :func:`insert` has put them."""
        parts = {"scale": self.scale, "shift": self.shift}
        return {f"{_prefix(site)}.{name}": part[site] for site in self.scale for name, part in parts.items()}

    def only(self, sites: Iterable[Site]) -> Correction:
        """Restrict the correction to some of the sites."""
        sites = list(sites)
        return Correction({site: self.scale[site] for site in sites}, {site: self.shift[site] for site in sites})

    def updated_by(self, other: Correction) -> Correction:
        """Combine with another correction, whose values count where both have a site."""
        return Correction({**self.scale, **other.scale}, {**self.shift, **other.shift})

    def identity(self) -> Correction:
        """Build the correction of the same sites that changes nothing."""
        ones = {site: torch.ones_like(scale) for site, scale in self.scale.items()}
        return Correction(ones, {site: torch.zeros_like(shift) for site, shift in self.shift.items()})

    def apply(self, site: Site, activation: Tensor) -> Tensor:
        """Correct the activation of a site: ``(N, …) -> (N, …)``."""
        return _apply(site, activation, self.scale[site], self.shift[site])

    def applied(self, module: nn.Module) -> AbstractContextManager[None]:
        """Correct the activations of a module while the context lasts."""
        return at_sites(plain(module), self.sites, self.apply)


def correction_towards(goals: Goals, now: Mapping[Site, Moments], dtype: torch.dtype = torch.float32) -> Correction:
    """Compute the correction that takes all sites from their present statistics to those of the goals."""
    affine = {site: goals.affine(site, moments) for site, moments in now.items()}
    return Correction(*({site: values[i].to(dtype) for site, values in affine.items()} for i in (0, 1)))


def _apply(site: Site, activation: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return activation * site.along(scale.to(activation), activation) + site.along(shift.to(activation), activation)


# As modules


class Affine(nn.Module):
    """An affine map along one axis, ``scale · x + shift``.

    Args:
        site: Where it stands.
        scale: ``(channels,)``.
        shift: ``(channels,)``.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, site: Site, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.site = site
        self.register_buffer("scale", scale.clone())
        self.register_buffer("shift", shift.clone())

    def forward(self, activation: Tensor) -> Tensor:
        """Correct an activation: ``(N, …) -> (N, …)``."""
        return _apply(self.site, activation, self.scale, self.shift)

    def extra_repr(self) -> str:
        """Describe the module, as ``print`` shows it."""
        return f"{len(self.scale)} channels, axis {self.site.axis}"


def insert(module: nn.Module, correction: Correction) -> nn.Module:
    """Copy a module and correct its activations by modules of their own.

    The part of a site gets a child ``correction`` (``input_correction`` for an input) with the buffers ``scale`` and
    ``shift``, and a hook that calls it; so they are in the ``state_dict``, and go along with copies and pickles.

    Args:
        module: The module; it is not changed.
        correction: The corrections. The values for other tasks are loaded as any other state.

    Raises:
        MergeError: If there is no such part, or if it cannot have such a child.
    """
    module = copy.deepcopy(plain(module))
    parts = dict(module.named_modules())
    raise_all([problem for site in correction.sites for problem in _insertion_problems(site, parts)])
    for site in correction.sites:
        part = parts[site.path]
        part.add_module(_child(site), Affine(site, correction.scale[site], correction.shift[site]))
        if site.input:
            part.register_forward_pre_hook(_correct_input)
        else:
            part.register_forward_hook(_correct_output)
    return module


def _insertion_problems(site: Site, parts: Mapping[str, nn.Module]) -> Iterator[str]:
    part = parts.get(site.path)
    if part is None:
        yield f"The module has no part {site.path!r} to correct."
    elif isinstance(part, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        kind = type(part).__name__
        yield f"{site.path!r} is a {kind}, which would run a correction as one more part; name a part of it."
    elif hasattr(part, _child(site)):
        yield f"{site.path!r} has a {_child(site)!r} already; insert corrections into the module without any."


def state_of(module: nn.Module, correction: Correction) -> dict[str, Tensor]:
    """Build the entries of a correction in the state of what :func:`insert` returns.

    Args:
        module: The module without corrections. A part that it has under several names has an entry under each.
        correction: The correction.
    """
    parts = dict(plain(module).named_modules(remove_duplicate=False))
    homes = {
        replace(site, path=path): site
        for site in correction.sites
        for path, part in parts.items()
        if part is parts[site.path]
    }
    values = ({alias: part[site] for alias, site in homes.items()} for part in (correction.scale, correction.shift))
    return Correction(*values).state


def _correct_input(part: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return (part.input_correction(args[0]), *args[1:]) if args else None


def _correct_output(part: Any, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, (tuple, list)):
        return type(output)((part.correction(output[0]), *output[1:]))
    return part.correction(output)


def _child(site: Site) -> str:
    return "input_correction" if site.input else "correction"


def _prefix(site: Site) -> str:
    return f"{site.path}.{_child(site)}".lstrip(".")


# As a file


class _Place(TypedDict):
    task: str
    path: str
    axis: int
    input: bool


class _Noted(TypedDict):
    tasks: list[str]
    sites: dict[str, _Place]


def save_corrections(path: str | os.PathLike[str], corrections: Mapping[str, Correction]) -> Path:
    """Write the corrections of all tasks to one safetensors file, completely or not at all.

    Raises:
        MergeError: If it cannot be written; what stood there before is still there.
    """
    path = local_path(path)
    entries = _entries(corrections)
    tensors = {
        f"{key}.{name}": getattr(corrections[task], name)[site]
        for key, (task, site) in entries.items()
        for name in ("scale", "shift")
    }
    noted = {
        "tasks": list(corrections),
        "sites": {
            key: {"task": task, "path": site.path, "axis": site.axis, "input": site.input}
            for key, (task, site) in entries.items()
        },
    }
    save_tensors(path, tensors, {"corrections": json.dumps(noted)})
    return path


def load_corrections(path: str | os.PathLike[str]) -> dict[str, Correction]:
    """Read the corrections of all tasks.

    Raises:
        MergeError: If the file cannot be read, or holds none.
    """
    from safetensors.torch import load_file

    path = fetch(path)
    if not path.is_file():
        raise MergeError(f"There is no file {path}; check the path to the corrections.")
    metadata, _, _ = read_header(path)
    tensors = load_file(path)
    what, remedy = f"{path} holds no corrections", "give a file that save_corrections wrote"
    try:
        noted: _Noted = load_json(metadata.get("corrections", ""))
    except ValueError as error:
        raise MergeError(f"{what}; {remedy}.") from error
    check_schema(noted, _Noted, what, remedy)
    values: dict[str, dict[str, dict[Site, Tensor]]] = {task: {"scale": {}, "shift": {}} for task in noted["tasks"]}
    for key, about in noted["sites"].items():
        if about["task"] not in values or not {f"{key}.scale", f"{key}.shift"} <= tensors.keys():
            raise MergeError(f"{path} is damaged: of {shown(key)} it holds no scale and shift, or no task; {remedy}.")
        for name, part in values[about["task"]].items():
            part[Site(about["path"], about["axis"], about["input"])] = tensors[f"{key}.{name}"]
    return {task: Correction(**parts) for task, parts in values.items()}


def _entries(corrections: Mapping[str, Correction]) -> dict[str, tuple[str, Site]]:
    """Name the entry of the file for every task and site: ``{key: (task, site)}``."""
    return {
        f"{task}/{site.name}": (task, site) for task, correction in corrections.items() for site in correction.sites
    }
