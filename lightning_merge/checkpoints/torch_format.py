"""Files of ``torch.save``: Lightning checkpoints and state dicts.

Nothing here runs code from a file: pickles are loaded with ``weights_only=True`` and there is no way around it.

Such a file is a zip archive of a pickle and one uncompressed record for every storage. Loaded to the ``meta`` device,
a storage knows the position of its record, so that values can be read later, tensor by tensor. Where that cannot be
relied on, the file is loaded as a whole.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from lightning_merge.checkpoints.contents import choose_state, header_of
from lightning_merge.checkpoints.files import InputFile, first_line
from lightning_merge.checkpoints.remote import fetch
from lightning_merge.checkpoints.torch_archive import Record, check_archive, check_size, find_records
from lightning_merge.checkpoints.weights import Weights, from_memory, named_tensors
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.nested import check_expanded, replace_tensors, walk
from lightning_merge.utilities.tensors import find_tied


class _Place(NamedTuple):
    """Byte range of a tensor's values in a file, and their layout."""

    record: Record
    begin: int
    size: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


def open_torch(name: str, path: Path, part: str | None = None) -> Weights:
    """Open a file of ``torch.save`` (or a ``part`` of it) as weights, see :func:`~lightning_merge.open_weights`."""
    file = InputFile(path)
    try:
        records = find_records(file)
        weights = _open_lazily(name, file, records, part) if records is not None and _tells_positions() else None
        if weights is None:
            mapped = records is not None and not _tells_positions()
            check_archive(path)
            state, header = _parts(path, torch.load(path, map_location="cpu", mmap=mapped, weights_only=True), part)
            weights = from_memory(name, state, path, header)
            if empty := [key for key, tensor in weights.items() if tensor.is_meta]:
                raise MergeError(f"{empty[0]!r} in {path} has no values: it was saved from the meta device.")
    except MergeError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise anything
        raise _explained(path, error) from error
    file.check_unchanged()
    return weights


def load_plain(source: str | os.PathLike[str] | IO[bytes], map_location: Any = "cpu") -> Any:
    """Load all that a file of ``torch.save`` holds, running no code.

    Args:
        source: The file, or an open one.
        map_location: Where tensors are loaded to, as for ``torch.load``.

    Raises:
        MergeError: If the file is damaged, no file of torch, or cannot be loaded without running code.
    """
    if isinstance(source, (str, os.PathLike)):
        source = fetch(source)
    try:
        if not hasattr(source, "read"):
            find_records(InputFile(source))
            if map_location != "meta":
                check_archive(Path(source))
        return torch.load(source, map_location=map_location, weights_only=True)
    except MergeError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise anything
        raise _explained(source, error) from error


def _explained(path: Any, error: Exception) -> MergeError:
    """Put an error of PyTorch into a sentence, without its advice to load the file unsafely."""
    message = str(error)
    if isinstance(error, pickle.UnpicklingError) and (refused := re.search(r"GLOBAL (\S+)", message)):
        return MergeError(
            f"{path} cannot be loaded without running code that is stored in it ({refused[1]}), so it was refused; "
            "save its state_dict alone and give that file."
        )
    reason = first_line(Exception(message.partition("WeightsUnpickler error: ")[2] or error))
    return MergeError(f"{path} is damaged or no PyTorch file ({reason}); copy it again.")


def _parts(path: Path, content: Any, part: str | None) -> tuple[Mapping[Any, Any], dict[str, Any]]:
    """Split what was loaded into the state dict and a header: what else the file holds."""
    if not isinstance(content, Mapping):
        raise MergeError(f"{path} holds a {type(content).__name__}, not a state dict.")
    state, place, others = choose_state(path, content, part)
    header = header_of(content, state, place, others, part)
    check_expanded(str(path), header)
    return state, header


def _open_lazily(name: str, file: InputFile, records: Mapping[int, Record], part: str | None) -> Weights | None:
    """Open weights that are read from their records when they are asked for; None if not all of them can be."""
    try:
        content = torch.load(file.path, map_location="meta", weights_only=True)
    except Exception:  # sparse or quantized, or damaged: loading to the CPU, which comes next, finds it out
        return None
    state, header = _parts(file.path, content, part)
    tensors = named_tensors(name, state)
    find = partial(_find_place, records=records)
    try:
        places = {key: find(tensor) for key, tensor in tensors.items()}
        for _, part in walk(header):
            if isinstance(part, Tensor):
                find(part)
    except LookupError:
        return None
    check_size(file, sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()))
    return Weights(
        name,
        readers={key: partial(_read, file, place) for key, place in places.items()},
        meta={key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()},
        path=file.path,
        header=replace_tensors(header, lambda tensor: _read(file, find(tensor))),
        tied=find_tied({key: place for key, place in places.items() if place.size}),
        inputs=[file],
    )


def _find_place(tensor: Tensor, records: Mapping[int, Record]) -> _Place:
    """Find where the values of a tensor ``(…)`` on the ``meta`` device are.

    Raises:
        LookupError: If they are in none of the records.
    """
    storage = tensor.untyped_storage()
    position = getattr(storage, "_checkpoint_offset", None)
    record = None if position is None else records.get(position)
    if record is None or record.size != storage.nbytes() or tensor.is_conj() or tensor.is_neg():
        raise LookupError("no record holds these values as they are")
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = int(last + 1) * tensor.itemsize if tensor.numel() else 0
    begin = int(tensor.storage_offset()) * tensor.itemsize
    if begin + size > storage.nbytes():
        raise LookupError("the record ends before these values do")
    return _Place(record, record.begin + begin, size, tensor.dtype, tensor.shape, tensor.stride())


def _read(file: InputFile, place: _Place) -> Tensor:
    if not place.size:
        return torch.empty(place.shape, dtype=place.dtype)
    return place.record.read(file, place.begin, place.size).view(place.dtype).as_strided(place.shape, place.stride)


@cache
def _tells_positions() -> bool:
    """Tell whether this PyTorch notes the position of a record in the storage that it loads to the ``meta`` device."""
    file = io.BytesIO()
    torch.save(torch.zeros(1), file)
    file.seek(0)
    storage = torch.load(file, map_location="meta", weights_only=True).untyped_storage()
    return hasattr(storage, "_checkpoint_offset")
