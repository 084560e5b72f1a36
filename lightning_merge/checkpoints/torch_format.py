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
import sys
import zipfile
import zlib
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from lightning_merge.checkpoints.contents import choose_state, header_of
from lightning_merge.checkpoints.files import InputFile, first_line
from lightning_merge.checkpoints.recognition import check_archive_kind
from lightning_merge.checkpoints.remote import fetch
from lightning_merge.checkpoints.weights import Weights, from_memory, named_tensors
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.nested import check_expanded, replace_tensors, walk
from lightning_merge.utilities.tensors import find_tied

_MAGIC = b"PK\x03\x04"
_BLOCK = 1 << 20  # bytes that are read at a time
_INFLATION, _SMALL = 10, 1 << 26  # a file's content may have so many times its bytes, or 64 MiB more
_LOCAL_HEADER = 30  # bytes that stand before every record of a zip archive, followed by its name and an extra field


class _Record:
    """The bytes of one storage, and their checksum in the archive, which is compared once.

    Args:
        begin: Position of the first byte.
        size: Bytes.
        checksum: Their CRC-32; None where the archive has none.
    """

    def __init__(self, begin: int, size: int, checksum: int | None) -> None:
        self.begin, self.size, self.checksum = begin, size, checksum

    def read(self, file: InputFile, begin: int, size: int) -> Tensor:
        """Read ``size`` bytes from position ``begin`` of the file: ``(size,)``, uint8.

        Raises:
            MergeError: If the record does not have its checksum.
        """
        whole = (begin, size) == (self.begin, self.size)
        content = file.read(begin, size)
        if self.checksum is not None and self.checksum != (zlib.crc32(content.numpy()) if whole else self._sum(file)):
            raise MergeError(f"{file.path} is damaged: a tensor in it does not have its checksum; copy it again.")
        self.checksum = None
        return content

    def _sum(self, file: InputFile) -> int:
        """Compute the checksum of the whole record, of which a tensor is a part."""
        end, total = self.begin + self.size, 0
        for begin in range(self.begin, end, _BLOCK):
            total = zlib.crc32(file.read(begin, min(_BLOCK, end - begin)).numpy(), total)
        return total


class _Place(NamedTuple):
    """Byte range of a tensor's values in a file, and their layout."""

    record: _Record
    begin: int
    size: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


def open_torch(name: str, path: Path, part: str | None = None) -> Weights:
    """Open a file of ``torch.save`` (or a ``part`` of it) as weights, see :func:`~lightning_merge.open_weights`."""
    file = InputFile(path)
    try:
        records = _find_records(file)
        weights = _open_lazily(name, file, records, part) if records is not None and _tells_positions() else None
        if weights is None:
            mapped = records is not None and not _tells_positions()
            _check_archive(path)
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
            _find_records(InputFile(source))
            if map_location != "meta":
                _check_archive(Path(source))
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


def _open_lazily(name: str, file: InputFile, records: Mapping[int, _Record], part: str | None) -> Weights | None:
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
    _check_size(file, sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()))
    return Weights(
        name,
        readers={key: partial(_read, file, place) for key, place in places.items()},
        meta={key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()},
        path=file.path,
        header=replace_tensors(header, lambda tensor: _read(file, find(tensor))),
        tied=find_tied({key: place for key, place in places.items() if place.size}),
        inputs=[file],
    )


def _find_place(tensor: Tensor, records: Mapping[int, _Record]) -> _Place:
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
    size = (last + 1) * tensor.itemsize if tensor.numel() else 0
    begin = tensor.storage_offset() * tensor.itemsize
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


def _find_records(file: InputFile) -> dict[int, _Record] | None:
    """Find the storages of a file.

    Returns:
        The record at every position, in bytes; None if the storages do not lie there as they are in memory (a file of
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
            check_archive_kind(file.path, infos)
            _check_size(file, sum(info.file_size for info in listed))
            if (size := infos["data.pkl"].file_size) > file.size + _BLOCK:  # torch.save compresses nothing
                raise MergeError(
                    f"{file.path} has {file.size:,} bytes, and {size:,} say what it holds; it is no model."
                )
            _forget_zeros(archive)
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
        records = {}
        for info in data:
            begin = _data_position(stream, info)
            records[begin] = _Record(begin, info.file_size, info.CRC if hasattr(info, "CRC") else None)
    for record in records.values():
        if record.begin + record.size > file.size:
            raise MergeError(f"{file.path} is damaged: it ends within one of its tensors; copy it again.")
    return records


def _check_archive(path: Path) -> None:
    """Compare the checksums of all records of an archive, which PyTorch does not when it loads a file as a whole.

    Raises:
        MergeError: If one is not that of its record.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        _forget_zeros(archive)
        damaged = archive.testzip()
    if damaged is not None:
        raise MergeError(f"{path} is damaged: {damaged} in it does not have its checksum; copy it again.")


def _forget_zeros(archive: zipfile.ZipFile) -> None:
    """Compare no checksums that were left out on request, see ``torch.serialization.set_crc32_options``."""
    for info in archive.infolist():
        if not info.CRC:
            del info.CRC


def _check_size(file: InputFile, size: int) -> None:
    """Raise a :class:`MergeError` if the content of a file is out of proportion to its bytes."""
    if size > _INFLATION * file.size + _SMALL:
        raise MergeError(
            f"{file.path} has {file.size:,} bytes and would unpack to {size:,}, more than {_INFLATION} times as many; "
            "no model is stored so. Load it where it was made and save it again with torch.save, uncompressed."
        )


def _data_position(stream: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Find the byte at which the data of a record starts; -1 where the archive contradicts itself."""
    stream.seek(info.header_offset)
    header = stream.read(_LOCAL_HEADER)
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    if header[: len(_MAGIC)] != _MAGIC or stream.read(name) != info.filename.encode():
        return -1
    return info.header_offset + _LOCAL_HEADER + name + extra
