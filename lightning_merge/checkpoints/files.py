"""Read a file piece by piece and notice when it is no longer the one that was opened.

No file is mapped into memory: the pages of a mapping count as memory of the process, and touching one that was cut off
kills it. No file stays open either, so that any number of shards can be read from any number of threads.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lightning_merge.utilities.errors import MergeError

_UNSAFE_ADVICE = re.compile(
    r"weights_only|safe_globals|trust_remote_code|allow_pickle|use_safetensors|arbitrary code|trusted source"
)
_BLOCK = 1 << 20  # bytes that are hashed at a time
_DIGESTS: dict[tuple[str, int, int, int, int], str] = {}  # (path, size, mtime_ns, inode, ctime_ns) -> sha256


class InputFile:
    """A file that is read at given positions, by any number of threads.

    Args:
        path: The file; it is found again after a change of the working directory.

    Attributes:
        path: As it was given, for messages.
        size: Bytes.

    Raises:
        MergeError: If it is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._absolute = self.path.absolute()
        with self._failing_clearly():
            self._identity = _identity(os.stat(self._absolute))
        self.size = self._identity[0]

    def read(self, begin: int, size: int) -> Tensor:
        """Read ``size`` bytes from position ``begin``.

        Returns:
            A new tensor, ``(size,)``, uint8.

        Raises:
            MergeError: If the file does not reach that far, cannot be read, or was changed since it was opened.
        """
        if begin < 0 or size < 0 or begin + size > self.size:
            raise MergeError(
                f"{self.path} is damaged: it has {self.size} bytes, and {begin} to {begin + size} are asked."
            )
        buffer = torch.empty(size, dtype=torch.uint8)
        free = buffer.numpy().data
        with self._failing_clearly(), open(self._absolute, "rb", buffering=0) as file:
            file.seek(begin)
            while free and (count := file.readinto(free)):  # one call reads 2 GiB at most
                free = free[count:]
            self._compare(os.fstat(file.fileno()))
        if free:
            raise MergeError(f"{self.path} ended {len(free)} bytes early when it was read; copy it again.")
        return buffer

    def head(self, size: int) -> bytes:
        """Read the first bytes, fewer where there are not so many."""
        with self._failing_clearly(), open(self._absolute, "rb") as file:
            return file.read(size)

    def check_unchanged(self) -> None:
        """Raise a :class:`MergeError` if the file is not the one that was opened.

        Size, inode and time of change must be the same. Where the system notes that something was done to the file
        (another name, other rights, or a content whose time was set back), its content is hashed again and compared.
        """
        with self._failing_clearly():
            self._compare(os.stat(self._absolute))

    def fingerprint(self) -> str:
        """Compute the sha256 of the file, once for as long as the file does not change."""
        self.check_unchanged()
        if self._key not in _DIGESTS:
            digest, status = self._hash()
            self._compare(status)
            _DIGESTS[self._key] = digest
        return _DIGESTS[self._key]

    def _hash(self) -> tuple[str, os.stat_result]:
        """Compute the sha256 of the content, and look at the file once more."""
        digest, buffer = hashlib.sha256(), bytearray(_BLOCK)
        with self._failing_clearly(), open(self._absolute, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
            return digest.hexdigest(), os.fstat(file.fileno())

    def note_fingerprint(self, digest: str) -> None:
        """Take over the sha256 that another process has computed."""
        _DIGESTS[self._key] = digest

    @property
    def _key(self) -> tuple[str, int, int, int, int]:
        return str(self._absolute), *self._identity

    def _compare(self, status: os.stat_result) -> None:
        identity = _identity(status)
        if identity == self._identity:
            return
        if identity[:-1] == self._identity[:-1] and self._key in _DIGESTS:
            digest, status = self._hash()
            if digest == _DIGESTS[self._key] and _identity(status) == identity:
                self._identity = identity
                _DIGESTS[self._key] = digest
                return
        raise MergeError(
            f"{self.path} was changed while it was read; nothing that was read of it can be relied on, so start again "
            "once no one writes to it."
        )

    @contextmanager
    def _failing_clearly(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise MergeError(f"There is no file {self.path} (any more); check the path to the weights.") from error
        except OSError as error:
            reason = error.strerror or error
            raise MergeError(f"{self.path} cannot be read: {reason}; check your rights to it, and the disk.") from error


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """Return size, time of change, inode, and when anything was last done to the file, which nobody can set."""
    changed = 0 if os.name == "nt" else status.st_ctime_ns  # on Windows the time of creation
    return status.st_size, status.st_mtime_ns, status.st_ino, changed


def first_line(error: Exception) -> str:
    """Take the first line of an error's message, after the type of the error where it is no more than a word.

    Advice to switch the safety of a loader off is left out.
    """
    sentences = re.split(r"(?<=[.!;]) ", (str(error).splitlines() or [""])[0])
    line = " ".join(sentence for sentence in sentences if not _UNSAFE_ADVICE.search(sentence)).strip()
    return line if " " in line else f"{type(error).__name__} {line}".strip()
