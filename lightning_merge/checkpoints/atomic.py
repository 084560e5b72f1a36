"""Put files and folders in their place at once, so that nobody ever sees half of one."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_merge.utilities.errors import MergeError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the folder of ``path``; when the block ends well, that file becomes ``path``.

    Raises:
        MergeError: If the file cannot be written (no such right, disk full); what stood at ``path`` is still there.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary_name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(temporary_name)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        put_in_place(temporary, path)
    except OSError as error:
        raise MergeError(f"Could not write {path}: {error.strerror or error}; nothing was changed there.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def put_in_place(new: Path, path: Path) -> None:
    """Rename a complete file once its content is on the disk; it replaces a file that has the name already."""
    with new.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(new, path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")


def check_parent(path: Path) -> None:
    """Raise a :class:`MergeError` if nothing can be written to a path, because of the folder it is in."""
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise MergeError(f"Cannot write {path}: {existing} is no folder that can be written to.")


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, where the system can do that."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def swap(new: Path, path: Path) -> None:
    """Put a new folder in the place of an old one, which is removed if there is one.

    Linux exchanges two names in one step. Elsewhere the old folder is moved away first, and back if that fails.

    Raises:
        OSError: If it cannot be done; the old folder is still there.
    """
    old = new
    if not path.exists():
        new.rename(path)
    elif not _exchange_names(new, path):
        old = _aside(path)
        remove(old)
        path.rename(old)
        try:
            new.rename(path)
        except OSError:
            old.rename(path)
            raise
    sync(path.parent)
    remove(old)


def restore(path: Path) -> None:
    """Bring back the folder that :func:`swap` had moved away when it was killed."""
    if not path.exists() and _aside(path).exists():
        _aside(path).rename(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchange_names(one: Path, other: Path) -> bool:
    """Exchange the names of two paths in one step; return False where the system or its file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
