"""A private folder beside an output, in which it is written until it is complete, and the lock that keeps others out.

The folder is called ``.NAME.<16 hexadecimal digits>.part``. Nobody can foresee its name and plant a link there, nobody
else can enter it, and it is on the output's disk, so that what is complete takes its place by a change of its name. A
record in it tells it from any other folder of such a name: only what this package has made is ever removed.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from lightning_merge.utilities.errors import MergeError

try:
    import fcntl
except ImportError:  # on Windows two processes that write one output are not kept apart
    fcntl = None  # type: ignore[assignment]

SWAPPED = "swapped"
"""A folder in a private one that is, or soon may be, what stood in the output's place; it is not to be removed."""
_RECORD = "begun"
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.([0-9a-f]{16}\.part|lock)", re.DOTALL)
_PLAINLY = sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


def open_new(path: Path) -> BinaryIO:
    """Create a file, for reading and writing; anything that has its name already, a link too, is an OSError."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _PLAINLY, 0o666)
    return os.fdopen(handle, "r+b", buffering=0)


def open_plain(path: Path, *, write: bool = False) -> BinaryIO:
    """Open a regular file that is there, never through a symbolic link.

    Args:
        path: The file.
        write: Whether it is written to, too; then it must have no other name.

    Raises:
        OSError: If it is something else, or not there.
    """
    file = os.fdopen(
        os.open(path, (os.O_RDWR if write else os.O_RDONLY) | _PLAINLY), "r+b" if write else "rb", buffering=0
    )
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and (status.st_nlink == 1 or not write):
        return cast(BinaryIO, file)
    file.close()
    raise OSError(f"{path.name} is no regular file, or has a second name")


@contextmanager
def private_folder(path: Path) -> Iterator[Path]:
    """Yield a new private folder beside a path, which nobody else can write meanwhile; it is removed at the end.

    What processes that were killed have left of earlier ones is removed, too.

    Raises:
        MergeError: If another process goes on writing the path.
        OSError: If no folder can be made there.
    """
    with alone(path, patience=10) as surely:
        for left in private_folders(path) if surely else []:
            remove_private(left)
        folder = make_private(path)
        try:
            yield folder
        finally:
            remove_private(folder)


def make_private(path: Path) -> Path:
    """Make a private folder beside a path."""
    folder = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    folder.mkdir(mode=0o700)
    open_new(folder / _RECORD).close()
    return folder


def private_folders(path: Path) -> list[Path]:
    """Find the private folders beside a path; those of others are left behind, if this process has the lock."""
    return sorted(entry for entry in path.parent.glob(".*.part") if written_for(entry) == path.name)


def mode_of_new(folder: Path) -> int:
    """Tell the mode that the system gives a new file here; it has given it to the record of a private folder."""
    return stat.S_IMODE((folder / _RECORD).stat().st_mode)


def remove_private(folder: Path) -> None:
    """Remove a private folder, but for a folder in it that stood in the place of the output."""
    for entry in folder.iterdir():
        if entry.name not in (_RECORD, SWAPPED):
            remove(entry)
    if all(entry.name == _RECORD for entry in folder.iterdir()):
        remove(folder)


def written_for(path: Path) -> str | None:
    """Tell for which file beside it a private folder or a lock was made; None if it is neither."""
    found = _TEMPORARY.fullmatch(path.name)
    is_lock = path.suffix == ".lock" and is_plain(path) and path.stat().st_size == 0
    return found["name"] if found and (is_lock or _is_made(path)) else None


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _is_made(folder: Path) -> bool:
    """Tell whether a folder is a private one that this user has made: it holds the record, or nothing yet."""
    with suppress(OSError):
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and (not hasattr(os, "geteuid") or status.st_uid == os.geteuid()):
            return folder.suffix == ".part" and (is_plain(folder / _RECORD) or not any(folder.iterdir()))
    return False


def is_plain(path: Path) -> bool:
    """Tell whether a path is a regular file that has no other name."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


@contextmanager
def alone(path: Path, patience: float = 0.0) -> Iterator[bool]:
    """Keep other processes that ask for the same from writing a path while the block runs.

    Args:
        path: What is written. The lock is an empty file beside it, to which nothing is ever written.
        patience: How long to wait for another process, in seconds.

    Yields:
        Whether they are kept from it: some systems and file systems have no locks.

    Raises:
        MergeError: If another process is writing it, or if something else has the name of the lock.
        OSError: If no file can be made there.
    """
    lock = path.with_name(f".{path.name}.lock")
    file = None if fcntl is None else _take(lock, path, time.monotonic() + patience)
    try:
        yield file is not None
    finally:
        if file is not None:
            _give_back(file, lock)


def _take(lock: Path, path: Path, until: float) -> BinaryIO | None:
    """Lock a file, or wait for who has locked it; return None where there are no locks."""
    while True:
        file = _open_lock(lock, path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
            file.close()  # who had it has just removed it
        except BlockingIOError as error:
            file.close()
            if time.monotonic() >= until:
                raise MergeError(
                    f"Another merge is writing {path}; wait until it is done, or give this one another output."
                ) from error
            time.sleep(0.02)
        except OSError:  # a file system that has no locks
            _give_back(file, lock)
            return None


def _open_lock(lock: Path, path: Path) -> BinaryIO:
    try:
        file = os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT | _PLAINLY, 0o600), "r+b", buffering=0)
    except OSError as error:
        if not os.path.lexists(lock):
            raise
        what = "is a link" if lock.is_symlink() else f"cannot be opened ({error.strerror})"
        raise MergeError(_not_ours(lock, path, what)) from error
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        file.close()
        raise MergeError(_not_ours(lock, path, "is another name of a file, or no file"))
    return file


def _not_ours(lock: Path, path: Path, what: str) -> str:
    return (
        f"{lock}, the lock of {path}, {what}, so that somebody else has made it; remove it if nobody is writing there, "
        "or give another output."
    )


def _give_back(file: BinaryIO, lock: Path) -> None:
    """Remove a lock, unless it is a file with a content, which somebody else must have written, and open it."""
    with suppress(OSError):
        if os.fstat(file.fileno()).st_size == 0:
            lock.unlink()
    file.close()
