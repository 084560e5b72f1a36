"""Put files and folders in their place at once, so that nobody ever sees half of one."""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_merge.checkpoints.paths import check_name
from lightning_merge.checkpoints.private_folder import mode_of_new, private_folder
from lightning_merge.checkpoints.remote import check_store, upload
from lightning_merge.utilities.errors import MergeError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write, in a private folder; when the block ends well, that file becomes ``path``.

    Raises:
        MergeError: If the file cannot be written (no such right, disk full); what stood at ``path`` is still there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with private_folder(path) as folder:
            new = folder / path.name
            yield new
            new.chmod(mode_of_new(folder))  # a library may have given it another one
            put_in_place(new, path)
    except OSError as error:
        raise MergeError(f"Could not write {path}: {error.strerror or error}; nothing was changed there.") from error


def put_in_place(new: Path, path: Path) -> None:
    """Rename a complete file once its content is on the disk; it gets name, owner and mode of a file that is there."""
    with new.open("rb+") as file:
        os.fsync(file.fileno())
    keep_mode(new, path)
    upload(new, path)
    os.replace(new, path)
    sync(path.parent)


def keep_mode(new: Path, path: Path) -> None:
    """Give a new file or folder the mode, and where that is allowed the owner, of the one that it replaces, if any."""
    try:
        old = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_IFMT(old.st_mode) != stat.S_IFMT(new.lstat().st_mode):  # a link: what it leads to is not replaced
        return
    if hasattr(os, "chown"):
        for owner in ((old.st_uid, -1), (-1, old.st_gid)):
            with suppress(OSError):
                os.chown(new, *owner)
    new.chmod(stat.S_IMODE(old.st_mode))


def write_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")


def check_parent(path: Path, is_folder: bool = False) -> None:
    """Raise a :class:`MergeError` if nothing can be written to a path, because of its name or the folder it is in."""
    check_name(path)
    check_store(path, is_folder)
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


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def exchange_names(one: Path, other: Path) -> bool:
    """Exchange the names of two paths in one step; return False where the system or its file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
