"""The weights of one model as a mapping from parameter name to tensor."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.checkpoints.contents import header_of
from lightning_merge.checkpoints.files import InputFile
from lightning_merge.checkpoints.paths import shown_path
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.schemas import MOST_TENSORS
from lightning_merge.utilities.tensors import tied_names


class Weights(Mapping[str, Tensor]):
    """The weights of one model, read parameter by parameter.

    Args:
        name: What to call this model in messages.
        readers: For every parameter a function that returns its tensor.
        meta: For every parameter a tensor on the ``meta`` device: its shape and dtype, known without reading it.
        path: The file behind it, if there is one; the index, if there are several.
        header: What else the file holds: ``hyper_parameters``, a ``merge`` manifest, what ``statistics`` are of; see
            :func:`lightning_merge.checkpoints.contents.header_of`.
        tied: Names that share a tensor with another name: ``{alias: name}``.
        inputs: All files behind it; by default ``path``.

    Attributes:
        origin: The base that these weights are kept as a difference to; None if they are weights themselves.
        low_rank: Whether some of these differences are products of factors.
    """

    origin: Weights | None = None
    low_rank: bool = False
    _digest: str | None = None

    def __init__(
        self,
        name: str,
        readers: Mapping[str, Callable[[], Tensor]],
        meta: Mapping[str, Tensor],
        path: Path | None = None,
        header: Mapping[str, Any] | None = None,
        tied: Mapping[str, str] | None = None,
        inputs: Sequence[InputFile] | None = None,
    ) -> None:
        self.name = name
        self.meta = meta
        self.path = path
        self.header = dict(header or {})
        self.tied = dict(tied or {})
        self._readers = readers
        if inputs is None:
            inputs = () if path is None else (InputFile(path),)
        self.inputs = tuple(inputs)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._readers:
            raise KeyError(f"{self.name} has no parameter {name!r}")
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __repr__(self) -> str:
        return f"Weights({self.name!r}, {len(self)} parameters)"

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file behind these weights; none where they live in memory."""
        return tuple(file.path for file in self.inputs)

    def check_unchanged(self) -> None:
        """Raise a :class:`MergeError` if one of the files was changed since these weights were opened.

        A file that is written to within the same tick of the file system's clock, and keeps its size, goes unnoticed.
        """
        for file in self.inputs:
            file.check_unchanged()

    def fingerprint(self) -> str | dict[str, str] | None:
        """Compute the sha256 of the file behind these weights, of several by file name; None where they are in memory.

        Raises:
            MergeError: If a file was changed since these weights were opened.
        """
        digests = {file.path.name: file.fingerprint() for file in self.inputs}
        return digests if len(digests) > 1 else next(iter(digests.values()), None)

    def provenance(self) -> dict[str, Any]:
        """Describe where these weights are from, in plain values: path and sha256 of the file, if there is one."""
        part = f"#{self.header['part']}" if "part" in self.header else ""
        return {"path": f"{shown_path(self.path)}{part}" if self.path else None, "sha256": self.fingerprint()}

    def delta(self, name: str, base: Tensor) -> Tensor | None:
        """Compute the difference of a parameter to a base's ``(…)`` where it is known exactly, otherwise None."""
        return None

    def factors(self, name: str, base: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """Read the factors ``(m, r)``, ``(r, n)`` of the difference to a base's ``(…)``; None if none are known."""
        return None

    def digest(self) -> str:
        """Compute the sha256 of all names, types, shapes and values, which is the same in any file or in memory.

        That of weights in files is computed once.
        """
        self.check_unchanged()
        if self._digest is None or not self.inputs:
            self._digest = self._hash()
        return self._digest

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(name for name in self if name not in self.tied):
            tensor = self[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def from_memory(
    name: str, state: Mapping[Any, Any], path: Path | None = None, header: Mapping[str, Any] | None = None
) -> Weights:
    """Wrap a state dict as weights; leave out entries that are no tensors, and note names that share a tensor."""
    tensors = named_tensors(name, state)
    return Weights(
        name,
        readers={key: partial(tensors.__getitem__, key) for key in tensors},
        meta={key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()},
        path=path,
        header=header if header is not None else header_of({}, state),
        tied=tied_names(tensors),
    )


def named_tensors(name: str, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Collect the tensors ``(…)`` of a state dict by their plain names.

    Raises:
        MergeError: If there are none, if a key is no name, or if one is not stored as a plain array of numbers.
    """
    tensors = {key: value.detach() for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise MergeError(f"{name} holds no tensors.")
    for key, tensor in tensors.items():
        if not isinstance(key, str):
            raise MergeError(f"{name} is no state dict: a tensor in it has the key {key!r} instead of a name.")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            raise MergeError(
                f"{key!r} in {name} is sparse, quantized or nested; make it a plain tensor, or leave it out."
            )
    return {plain: tensors[key] for plain, key in plain_names(name, tensors).items()}


def plain_names(name: str, keys: Iterable[str]) -> dict[str, str]:
    """Map the names of a model's parameters, without what wrappers of modules put into them, to the model's keys.

    Raises:
        MergeError: If there are very many, or two of the same name, or one that no module has.
    """
    names: dict[str, str] = {}
    keys = list(keys)
    if len(keys) > MOST_TENSORS:
        raise MergeError(f"{name} holds {len(keys):,} tensors, and no more than {MOST_TENSORS:,} are read.")
    for key in keys:
        plain = _WRAPPERS.sub("", key)
        if len(key) > _LONGEST_NAME:
            raise MergeError(f"{name} holds a tensor whose name has {len(key):,} characters; no module has such names.")
        if plain.endswith("_flat_param"):
            raise MergeError(
                f"{name} holds {key!r}, in which FSDP keeps many parameters as one; save the whole state dict "
                "(StateDictType.FULL_STATE_DICT, or get_model_state_dict with full_state_dict=True)."
            )
        if plain in names:
            raise MergeError(f"{name} holds {names[plain]!r} and {key!r}, which are the same parameter; remove one.")
        names[plain] = key
    return names


_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_fpw_module)\.")
"""What torch.compile, activation checkpointing and FSDP put into names."""
_LONGEST_NAME = 1000  # characters


def widest(base: Weights) -> torch.dtype:
    """Choose float64 if any of the weights have it, otherwise float32."""
    dtypes = {tensor.dtype for tensor in base.meta.values()}
    return torch.float64 if torch.float64 in dtypes else torch.float32
