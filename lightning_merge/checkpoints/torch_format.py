"""Files of ``torch.save``: Lightning checkpoints and state dicts.

Nothing here runs code from a file: pickles are loaded with ``weights_only=True`` and there is no way around it.

Such a file is a zip archive of a pickle and one uncompressed record for every storage. Loaded to the ``meta`` device,
a storage knows the position of its record, so that values can be read later, tensor by tensor. Where that cannot be
relied on, the file is loaded as a whole.
"""

from __future__ import annotations

import io
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from lightning_merge.checkpoints.files import InputFile, first_line
from lightning_merge.checkpoints.weights import Weights, from_memory, named_tensors
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.tensors import find_tied

_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = 30  # bytes that stand before every record of a zip archive, followed by its name and an extra field


class _Place(NamedTuple):
    """Byte range of a tensor's values in a file, and their layout."""

    begin: int
    size: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


def open_torch(name: str, path: Path) -> Weights:
    """Open a file of ``torch.save`` as weights, see :func:`lightning_merge.checkpoints.open_weights`."""
    file = InputFile(path)
    try:
        records = _find_records(file)
        weights = _open_lazily(name, file, records) if records is not None and _tells_positions() else None
        if weights is None:
            mapped = records is not None and not _tells_positions()
            state, header = _parts(path, torch.load(path, map_location="cpu", mmap=mapped, weights_only=True))
            weights = from_memory(name, state, path, header)
            if empty := [key for key, tensor in weights.items() if tensor.is_meta]:
                raise MergeError(f"{empty[0]!r} in {path} has no values: it was saved from the meta device.")
    except MergeError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise anything
        raise _explained(path, error) from error
    file.check_unchanged()
    return weights


def _explained(path: Path, error: Exception) -> MergeError:
    """Put an error of PyTorch into a sentence, without its advice to load the file unsafely."""
    message = str(error)
    if isinstance(error, pickle.UnpicklingError) and (refused := re.search(r"GLOBAL (\S+)", message)):
        return MergeError(
            f"{path} cannot be loaded without running code that is stored in it ({refused[1]}), so it was refused; "
            "save its state_dict alone and give that file."
        )
    reason = message.partition("WeightsUnpickler error: ")[2].partition("\n")[0].strip()
    return MergeError(f"{path} is damaged or no PyTorch file ({reason or first_line(error)}); copy it again.")


def _parts(path: Path, content: Any) -> tuple[Mapping[Any, Any], dict[str, Any]]:
    """Split what was loaded into the state dict and a header: hyper-parameters and the manifest of a merge."""
    if not isinstance(content, Mapping):
        raise MergeError(f"{path} holds a {type(content).__name__}, not a state dict.")
    header = {key: content[key] for key in ("hyper_parameters", "merge") if key in content}
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise MergeError(f"{path} holds no state dict; its keys are {', '.join(map(str, list(content)[:8]))}.")
    return state, header


def _open_lazily(name: str, file: InputFile, records: Mapping[int, int]) -> Weights | None:
    """Open weights that are read from their records when they are asked for; None if not all of them can be."""
    from lightning_utilities.core.apply_func import apply_to_collection

    try:
        content = torch.load(file.path, map_location="meta", weights_only=True)
    except Exception:  # sparse or quantized, or damaged: loading to the CPU, which comes next, finds it out
        return None
    state, header = _parts(file.path, content)
    tensors = named_tensors(name, state)
    find = partial(_find_place, records=records)
    try:
        places = {key: find(tensor) for key, tensor in tensors.items()}
        apply_to_collection(header, Tensor, find)
    except LookupError:
        return None
    return Weights(
        name,
        readers={key: partial(_read, file, place) for key, place in places.items()},
        meta={key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()},
        path=file.path,
        header=apply_to_collection(header, Tensor, lambda tensor: _read(file, find(tensor))),
        tied=find_tied({key: place for key, place in places.items() if place.size}),
        inputs=[file],
    )


def _find_place(tensor: Tensor, records: Mapping[int, int]) -> _Place:
    """Find where the values of a tensor ``(…)`` on the ``meta`` device are.

    Raises:
        LookupError: If they are in none of the records.
    """
    storage = tensor.untyped_storage()
    position = getattr(storage, "_checkpoint_offset", None)
    if position is None or records.get(position) != storage.nbytes() or tensor.is_conj() or tensor.is_neg():
        raise LookupError("no record holds these values as they are")
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.itemsize if tensor.numel() else 0
    begin = tensor.storage_offset() * tensor.itemsize
    if begin + size > storage.nbytes():
        raise LookupError("the record ends before these values do")
    return _Place(position + begin, size, tensor.dtype, tensor.shape, tensor.stride())


def _read(file: InputFile, place: _Place) -> Tensor:
    if not place.size:
        return torch.empty(place.shape, dtype=place.dtype)
    return file.read(place.begin, place.size).view(place.dtype).as_strided(place.shape, place.stride)


@cache
def _tells_positions() -> bool:
    """Tell whether this PyTorch notes the position of a record in the storage that it loads to the ``meta`` device."""
    file = io.BytesIO()
    torch.save(torch.zeros(1), file)
    file.seek(0)
    storage = torch.load(file, map_location="meta", weights_only=True).untyped_storage()
    return hasattr(storage, "_checkpoint_offset")


def _find_records(file: InputFile) -> dict[int, int] | None:
    """Find where the storages of a file are.

    Returns:
        ``{position: size}`` in bytes; None if the storages do not lie there as they are in memory (a file of
        torch < 1.6, compressed records, the other byte order), or not in the order in which PyTorch looks for them.

    Raises:
        MergeError: If the pickle is damaged, or if a record reaches over the end of the file.
    """
    with file.path.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            return None
        with zipfile.ZipFile(stream) as archive:
            listed = archive.infolist()
            folder = listed[0].filename.partition("/")[0]
            infos = {info.filename.removeprefix(f"{folder}/"): info for info in listed}
            if len(infos) < len(listed):
                raise MergeError(f"{file.path} is damaged: two of its records have the same name.")
            for info in listed:
                if not info.CRC:  # left out on request, see torch.serialization.set_crc32_options
                    del info.CRC
            archive.read(infos["data.pkl"])  # compares its checksum, which PyTorch does not
            byteorder = archive.read(infos["byteorder"]) if "byteorder" in infos else b"little"
        data = sorted(
            (info for name, info in infos.items() if name.startswith("data/")), key=lambda info: info.header_offset
        )
        # Where there is a version, PyTorch derives positions from the sizes of the records before.
        expected = [f"{folder}/data/{i}" for i in range(len(data))]
        in_order = ".format_version" not in infos or [info.filename for info in data] == expected
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in data)
        if not (in_order and stored and byteorder.decode() == sys.byteorder):
            return None
        records = {_data_position(stream, info): info.file_size for info in data}
    for position, size in records.items():
        if position + size > file.size:
            raise MergeError(f"{file.path} is damaged: it ends within one of its tensors; copy it again.")
    return records


def _data_position(stream: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Find the byte at which the data of a record starts; -1 where the archive contradicts itself."""
    stream.seek(info.header_offset)
    header = stream.read(_LOCAL_HEADER)
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    if header[: len(_MAGIC)] != _MAGIC or stream.read(name) != info.filename.encode():
        return -1
    return info.header_offset + _LOCAL_HEADER + name + extra
