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

from lightning_merge.checkpoints.safetensors_format import LENGTH, SAFETENSORS_DTYPES
from lightning_merge.utilities.errors import MergeError

try:
    import fcntl
except ImportError:  # on Windows two merges into one file are not kept apart
    fcntl = None  # type: ignore[assignment]

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
        path: The file, under the name that it has until it is complete.
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
            MergeError: If another process is writing this file.
            OSError: If the disk is full or the folder cannot be written to.
        """
        self._file = open_alone(self.path)
        if self._resumable and self._is_this():
            self.done = self._believed()
        else:
            self.done = set()
            self._file.truncate(0)
            self._put(self.header, 0)
        self._start_journal()
        _reserve(self._file, self.size)

    def join(self, rank: int, done: set[str]) -> None:
        """Take part in writing a file that another process has created."""
        self._file = self.path.open("r+b", buffering=0)
        self.done = set(done)
        self._open_journal(rank)

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

    def forget(self) -> None:
        """Remove the journals."""
        for journal in self.journals():
            journal.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the file and its journals, while nobody else can write to it."""
        self.path.unlink(missing_ok=True)
        self.forget()
        self.close()

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

    def _is_this(self) -> bool:
        """Tell whether the file that is there was begun by the same merge."""
        return self._get(0, len(self.header)) == self.header

    def journals(self) -> list[Path]:
        """List the journals, which note what is finished: one file for each process."""
        if not self.path.parent.is_dir():
            return []
        pattern = re.compile(re.escape(self.path.name) + r"\.done\d+")
        return sorted(file for file in self.path.parent.iterdir() if pattern.fullmatch(file.name))

    def _open_journal(self, rank: int) -> None:
        if self._resumable:
            self._journal = self.path.with_name(f"{self.path.name}.done{rank}").open("ab", buffering=0)

    def _start_journal(self) -> None:
        """Put what is believed into one journal, and only then remove those of earlier runs."""
        if self.done:
            new = self.path.with_name(f"{self.path.name}.done0.new")
            new.write_bytes(b"".join(_note(name, self.checksum(name)) for name in sorted(self.done)))
            os.replace(new, self.path.with_name(f"{self.path.name}.done0"))
        for journal in self.journals()[bool(self.done) :]:
            journal.unlink()
        self._open_journal(0)

    def _believed(self) -> set[str]:
        """Find the tensors that are noted as finished and whose bytes have the checksum that was noted."""
        noted = {}
        for journal in self.journals():
            for line in journal.read_bytes().splitlines():
                try:
                    name, checksum = json.loads(line)
                except (ValueError, TypeError):
                    continue  # cut short by the end of the process
                noted[name] = checksum
        return {name for name, checksum in noted.items() if name in self.places and self.checksum(name) == checksum}


def _note(name: str, checksum: int) -> bytes:
    return json.dumps([name, checksum]).encode() + b"\n"


def open_alone(path: Path) -> BinaryIO:
    """Open a file for writing and keep other processes from doing so, for as long as it is open."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise MergeError(
                f"Another merge is writing {path}; wait until it is done, or give this one another output."
            ) from error
        except OSError:  # a file system that has no locks
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its writer has just completed and renamed it


def _reserve(file: BinaryIO, size: int) -> None:
    """Extend the file to its full size in bytes, so that a full disk is noticed before any work and not after it."""
    file.truncate(size)
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
