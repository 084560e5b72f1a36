"""A folder that only one process at a time may work in."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_merge.utilities.errors import MergeError

LOCK = ".lock"
"""The empty file in the folder that is locked; it stays there."""
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: set[int] = set()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder to this process alone within the block; the system frees it when the process ends in any way.

    Where the system or its file system knows no locks, there is none.

    Raises:
        MergeError: If another process has the folder, or if nothing can be written there.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        link = f"{folder / LOCK} is a link, which is not followed" if error.errno == errno.ELOOP else error.strerror
        raise MergeError(f"Could not lock the folder {folder}: {link}; choose another one.") from error
    _held.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MergeError(
                f"Another process is working in {folder}; wait until it has ended, or choose another folder."
            ) from error
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise MergeError(f"Could not lock the folder {folder}: {error.strerror}.") from error
        yield
    finally:
        _held.discard(handle)
        os.close(handle)


def _let_go() -> None:
    """Close the locks that a forked process has inherited, which would last as long as it does."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
