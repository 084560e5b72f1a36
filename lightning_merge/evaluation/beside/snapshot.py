"""What an evaluation may change in a module and in its data, and how it is put back."""

from __future__ import annotations

import functools
import io
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_merge.utilities.errors import MergeError

_LEFT_ALONE = (type, ModuleType, io.IOBase, Callback, DataLoader, Dataset, LightningDataModule, Logger, Optimizer)
"""What a module may point to and an evaluation leaves as it is."""
_LIBRARIES = ("builtins", "torch", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "logging")
"""Packages whose objects are left alone, unless they are modules, samplers or containers."""


class Snapshot:
    """A snapshot of a module, of what its data draw samples by, and of the random numbers of the run.

    Everything that can be reached from the module is kept: tensors, lists and mappings, attributes of objects,
    variables of closures, generators of random numbers. It is put back in place: every object stays the object that it
    was, so that whoever else holds it (an optimizer, a compiled function, a closure) sees what is put back. Caches of
    ``functools.lru_cache`` are emptied. Of the loaders, no samples are kept.

    Args:
        module: The module.
        loaders: The loaders of its evaluation.
        without: Tensors ``(…)`` whose content is not kept.

    Raises:
        MergeError: If something can be gone through only once, and so cannot be put back.
    """

    def __init__(self, module: LightningModule, loaders: Iterable[Any], without: Iterable[Tensor] = ()) -> None:
        self.tensors: list[Tensor] = []
        self._seen: dict[int, Any] = {
            id(tensor): tensor for tensor in without
        }  # holds on to them: an id is of its time
        self._restore: list[Callable[[], object]] = []
        with torch.inference_mode(False), torch.no_grad():
            self._keep([module, *module.parameters(), *module.buffers()], type(module).__name__, with_tensors=True)
            for loader in loaders:
                self._keep(_parts_of_loader(loader), "a loader", with_tensors=False)
        self._random = _collect_rng_states()

    def restore(self) -> None:
        """Put everything back."""
        for restore in self._restore:
            restore()
        _set_rng_states(self._random)

    def _keep(self, things: list[Any], owner: str, with_tensors: bool) -> None:
        """Keep what can be reached from some things.

        Args:
            things: Where to begin.
            owner: Whose they are, for the message.
            with_tensors: Whether tensors and arrays are kept, too, and data sets left alone; else it is the other way.
        """
        while things:
            thing = things.pop()
            if id(thing) in self._seen or isinstance(thing, (str, bytes, int, float, complex)) or thing is None:
                continue
            self._seen[id(thing)] = thing
            if isinstance(thing, (Tensor, np.ndarray)):
                if with_tensors:
                    self._keep_array(thing)
            elif with_tensors or not isinstance(thing, Dataset):
                if not _is_left_alone(thing):
                    things += self._parts(thing, owner)
            else:
                things.append(vars(thing))

    def _keep_array(self, array: Tensor | np.ndarray) -> None:
        if isinstance(array, np.ndarray):
            if array.flags.writeable:
                self._restore.append(functools.partial(np.copyto, array, array.copy()))
        elif not array.is_meta:
            self.tensors.append(array)
            self._restore.append(functools.partial(_restore_tensor, array, array.detach().clone()))

    def _parts(self, thing: Any, owner: str) -> Iterable[Any]:
        """Keep what one thing is by itself, and return what it points to."""
        if isinstance(thing, (dict, list, set, deque)):
            parts = _parts_of_container(thing)
            content = dict(thing) if isinstance(thing, dict) else list(thing)
            self._restore.append(functools.partial(_restore_container, thing, content, [*map(id, parts)]))
            return [*parts, *_parts_of(thing)]
        if isinstance(thing, CellType):
            try:
                value = thing.cell_contents
            except ValueError:  # it is empty
                return ()
            self._restore.append(functools.partial(setattr, thing, "cell_contents", value))
            return (value,)
        if isinstance(thing, torch.Generator):
            self._restore.append(functools.partial(thing.set_state, thing.get_state()))
        elif isinstance(thing, random.Random):
            self._restore.append(functools.partial(thing.setstate, thing.getstate()))
        elif isinstance(thing, np.random.RandomState):
            self._restore.append(functools.partial(thing.set_state, thing.get_state()))
        elif isinstance(thing, np.random.Generator):
            self._restore.append(functools.partial(setattr, thing.bit_generator, "state", thing.bit_generator.state))
        elif isinstance(thing, functools._lru_cache_wrapper):
            self._restore.append(thing.cache_clear)
            return (thing.__wrapped__,)
        elif isinstance(thing, Iterator) and _is_of(type(thing), ("builtins", "itertools", "torch")):
            raise MergeError(
                f"Every candidate is evaluated from the state in which the evaluation began, and {owner} holds "
                f"something that can be gone through only once ({type(thing).__name__}); make it a list."
            )
        return _parts_of(thing)


def _is_of(kind: type, packages: tuple[str, ...]) -> bool:
    """Tell whether a class is defined in one of these packages."""
    return kind.__module__.partition(".")[0] in packages


def _is_left_alone(thing: Any) -> bool:
    """Tell whether a thing is none of a module's own."""
    if isinstance(thing, (nn.Module, Sampler, torch.Generator)):
        return False
    of_library = _is_of(type(thing), _LIBRARIES)
    containers = (dict, list, set, deque, tuple, frozenset, CellType, FunctionType, MethodType, Iterator)
    return isinstance(thing, _LEFT_ALONE) or (of_library and not isinstance(thing, (*containers, weakref.ref)))


def _parts_of_loader(loader: Any) -> list[Any]:
    """List by what a loader chooses samples."""
    if not isinstance(
        loader, DataLoader
    ):  # an iterator of another library's begins anew by itself, or see CandidateLoop
        return [loader] if _is_of(type(loader), ("builtins", "itertools")) or not isinstance(loader, Iterator) else []
    return [loader.generator, loader.sampler, loader.batch_sampler, loader.dataset]


def _parts_of_container(container: Any) -> list[Any]:
    """List the entries of a container, keys of a mapping first."""
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def _parts_of(thing: Any) -> Iterable[Any]:
    """List what a thing points to that is no list or mapping."""
    if isinstance(thing, (tuple, frozenset)):
        return thing
    if isinstance(thing, MethodType):
        return (thing.__self__, thing.__func__)
    if isinstance(thing, functools.partial):
        return (thing.func, thing.args, thing.keywords)
    if isinstance(thing, weakref.ref):
        return (thing(),)
    if isinstance(thing, FunctionType):
        of_torch = thing.__globals__.get("__name__", "").startswith("torch.")  # what a compiler puts around a function
        return (vars(thing), *(() if of_torch else thing.__closure__ or ()))
    parts = [vars(thing)] if hasattr(thing, "__dict__") else []
    for kind in type(thing).__mro__:
        if not _is_of(kind, _LIBRARIES):
            parts += [value for name, value in vars(kind).items() if not name.startswith("__")]
            slots = getattr(kind, "__slots__", ())
            parts += [getattr(thing, slot, None) for slot in ([slots] if isinstance(slots, str) else slots)]
    return parts


def _restore_tensor(tensor: Tensor, content: Tensor) -> None:
    """Write into a tensor ``(…)`` what it held."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if (tensor.shape, tensor.dtype, tensor.device) == (content.shape, content.dtype, content.device):
            tensor.copy_(content)
        else:
            tensor.data = content.clone()


def _restore_container(container: Any, content: Any, ids: list[int]) -> None:
    """Put back the entries of a container, unless it has kept them."""
    if [*map(id, _parts_of_container(container))] == ids:
        return
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(content)
    else:
        container.update(content)
