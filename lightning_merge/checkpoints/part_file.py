"""A safetensors file in the making, written tensor by tensor, in any order, by several threads and processes."""

from __future__ import annotations

import errno
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_merge.checkpoints.private_folder import open_new, open_plain
from lightning_merge.checkpoints.safetensors_format import LENGTH, SAFETENSORS_DTYPES
from lightning_merge.utilities.errors import MergeError

_AT_ONCE = 1 << 30  # bytes; macOS refuses to write more than 2 GiB in one call
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class Place(NamedTuple):
    """Byte range ``[begin, end)`` of a tensor in the file, with its dtype and shape."""

    begin: int
    end: int
    dtype: torch.dtype
    shape: torch.Size


def lay_out(meta: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, Place]]:
    """Assign every tensor its place in a safetensors file, those of wide types first, so that all are aligned.

    Args:
        meta: A tensor ``(…)`` for every name, of which only shape and dtype count.
        metadata: Text for the header.

    Returns:
        The beginning of the file (length and header), and the place of every tensor.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    places, position = {}, 0
    for name, tensor in sorted(meta.items(), key=lambda item: -item[1].element_size()):
        end = position + tensor.numel() * tensor.element_size()
        has_name = tensor.dtype in _NAMES  # of another type, which only a file of torch can hold in the end, the bytes
        entries[name] = {
            "dtype": _NAMES[tensor.dtype] if has_name else _NAMES[torch.uint8],
            "shape": list(tensor.shape) if has_name else [end - position],
            "data_offsets": [position, end],
        }
        places[name] = Place(position, end, tensor.dtype, tensor.shape)
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    start = LENGTH + len(header)
    moved = {name: place._replace(begin=start + place.begin, end=start + place.end) for name, place in places.items()}
    return len(header).to_bytes(LENGTH, "little") + header, moved


class PartFile:
    """A safetensors file that is complete once every tensor was written to its place.

    One process creates it, further ones join. What is finished is noted in journals beside it where it is to be
    resumable; a note is believed only if the bytes still have its checksum.

    Args:
        path: The file, in a private folder, which it leaves when it is complete.
        meta: A tensor for every name, of which only shape and dtype count.
        metadata: Text for the header; the same merge has the same.
        resumable: Whether to keep journals.
    """

    def __init__(
        self, path: Path, meta: Mapping[str, Tensor], metadata: Mapping[str, str], resumable: bool = False
    ) -> None:
        self.path = path
        self.header, self.places = lay_out(meta, metadata)
        self.size = max((place.end for place in self.places.values()), default=len(self.header))
        self.done: set[str] = set()
        self.checksums: dict[str, int] = {}
        self._resumable = resumable
        self._file: BinaryIO | None = None
        self._journal: BinaryIO | None = None
        self._turn = Lock()

    def create(self) -> None:
        """Reserve the space for the whole file, or go on with the one that an earlier run of this merge has left.

        Raises:
            OSError: If the disk is full or the folder cannot be written to.
        """
        if self._resumable and self.is_begun():
            self._file = open_plain(self.path, write=True)
            self.done = self._believed()
        else:
            self.path.unlink(missing_ok=True)
            self._file = open_new(self.path)
            self._put(self.header, 0)
        self._start_journal()
        _reserve(self._file, self.size)

    def is_begun(self) -> bool:
        """Tell whether the same merge has begun to write this file."""
        try:
            with open_plain(self.path) as file:
                return file.read(len(self.header)) == self.header
        except OSError:
            return False

    def join(self, rank: int, done: set[str]) -> None:
        """Take part in writing a file that another process has created."""
        self._file = open_plain(self.path, write=True)
        self.done = set(done)
        if self._resumable:
            self._journal = open_new(self._journal_of(rank))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor ``(…)`` to its place. Any number of threads may write at once.

        Raises:
            OSError: If the disk is full.
        """
        place = self.places[name]
        if tensor.dtype != place.dtype or tensor.shape != place.shape:
            raise MergeError(
                f"{name!r} came out as {tensor.dtype} {tuple(tensor.shape)}; {place.dtype} {tuple(place.shape)} was "
                "announced. A merging method must keep the shape."
            )
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._put(content, place.begin)
        self.checksums[name] = zlib.crc32(content)
        if self._journal is not None:
            self._journal.write(_note(name, self.checksums[name]))

    def sync(self) -> None:
        """Flush what was written to the disk."""
        os.fsync(self._opened.fileno())

    def close(self) -> None:
        """Close the file and its journal."""
        for file in (self._file, self._journal):
            if file is not None:
                file.close()
        self._file = self._journal = None

    def checksum(self, name: str) -> int:
        """Compute the CRC-32 of the bytes that the file holds in the place of a tensor."""
        place = self.places[name]
        return zlib.crc32(self._get(place.begin, place.end))

    def mapped(self) -> dict[str, Tensor]:
        """Map the tensors ``(…)`` of the complete file into memory; they stay on the disk until they are read."""
        if self.size == len(self.header):
            return {name: torch.empty(place.shape, dtype=place.dtype) for name, place in self.places.items()}
        content = np.memmap(self.path, np.uint8, mode="c")
        return {
            name: torch.from_numpy(content[place.begin : place.end]).view(place.dtype).reshape(place.shape)
            for name, place in self.places.items()
        }

    @property
    def _opened(self) -> BinaryIO:
        """The file, which is open from :meth:`create` or :meth:`join` to :meth:`close`."""
        assert self._file is not None
        return self._file

    def _put(self, content: bytes | memoryview, position: int) -> None:
        content = memoryview(content)
        while content:
            if hasattr(os, "pwrite"):
                written = os.pwrite(self._opened.fileno(), content[:_AT_ONCE], position)
            else:  # Windows: one thread after another
                with self._turn:
                    self._opened.seek(position)
                    written = self._opened.write(content)
            content, position = content[written:], position + written

    def _get(self, begin: int, end: int) -> bytes:
        """Read bytes, while none are written; fewer where the file ends."""
        self._opened.seek(begin)
        content = bytearray()
        while (left := end - begin - len(content)) and (piece := self._opened.read(left)):
            content += piece
        return bytes(content)

    def _journals(self) -> list[Path]:
        """List the journals, which note what is finished: one file for each process."""
        pattern = re.compile(re.escape(self.path.name) + r"\.done\d+")
        return sorted(file for file in self.path.parent.iterdir() if pattern.fullmatch(file.name))

    def _journal_of(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.done{rank}")

    def _start_journal(self) -> None:
        """Note what is believed in one journal, and only then remove those of earlier runs."""
        if not self._resumable:
            return
        first, new = self._journal_of(0), self.path.with_name(f"{self.path.name}.noted")
        new.unlink(missing_ok=True)
        with open_new(new) as file:
            file.write(b"".join(_note(name, self.checksum(name)) for name in sorted(self.done)))
        os.replace(new, first)
        for journal in self._journals():
            if journal != first:
                journal.unlink()
        self._journal = open_plain(first, write=True)
        self._journal.seek(0, os.SEEK_END)

    def _believed(self) -> set[str]:
        """Find the tensors that are noted as finished and whose bytes have the checksum that was noted."""
        noted = {}
        for journal in self._journals():
            for line in journal.read_bytes().splitlines():
                try:
                    name, checksum = json.loads(line)
                except (ValueError, TypeError):
                    continue  # cut short by the end of the process
                noted[name] = checksum
        return {name for name, checksum in noted.items() if name in self.places and self.checksum(name) == checksum}


def _note(name: str, checksum: int) -> bytes:
    return json.dumps([name, checksum]).encode() + b"\n"


def _reserve(file: BinaryIO, size: int) -> None:
    """Extend the file to its full size in bytes, so that a full disk is noticed before any work and not after it."""
    file.truncate(size)
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
