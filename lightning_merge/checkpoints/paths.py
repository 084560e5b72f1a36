"""Paths and URLs: every URL of a store has a place of the same name in a temporary folder of this process."""

from __future__ import annotations

import atexit
import errno
import os
import re
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path, PurePosixPath

from lightning_merge.utilities.errors import MergeError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):(/+)(.*)", re.DOTALL)  # one slash is left of a URL made into a Path
_LOCAL = ("file", "local")
_ROOM = 40  # bytes that a temporary name may have more than the file's own


def is_url(path: object) -> bool:
    """Tell whether a path is the URL of a store; ``file://…`` is none, but a path of this machine."""
    return isinstance(path, (str, os.PathLike)) and (_split(path) or _LOCAL)[0] not in _LOCAL


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return where a file is on this machine: the path without ``~``, of a URL the place of its copy.

    Raises:
        MergeError: If no file can have this name, or if there is no such kind of store.
    """
    if (parts := _split(path)) is None:
        return _checked(Path(path).expanduser())
    protocol, rest = parts
    if protocol in _LOCAL:
        return _checked(Path(f"/{rest}"))
    names = PurePosixPath(rest).parts
    if not names or ".." in names:
        raise MergeError(f"{os.fspath(path)} names nothing in a store; write {protocol}://PLACE/NAME, without '..'.")
    return _checked(root_of_copies().joinpath(protocol, *names))


def url_of(path: Path) -> str | None:
    """Return the URL whose copy a path is the place of; None for any other file."""
    if not root_of_copies.cache_info().currsize or root_of_copies() not in path.parents:
        return None
    protocol, *names = path.relative_to(root_of_copies()).parts
    return f"{protocol}://{'/'.join(names)}" if names else None


def shown_path(path: Path | None) -> str | None:
    """Return how a path is noted: as its URL, if it is the copy of one."""
    return None if path is None else url_of(path) or str(path)


def path_here(path: str | os.PathLike[str], what: str) -> Path:
    """Return the path of something that is not written to a store.

    Args:
        path: The path.
        what: What is written there, for the message.

    Raises:
        MergeError: If it is a URL.
    """
    if is_url(path):
        raise MergeError(
            f"{what} is written piece by piece and read again, and cannot be at {os.fspath(path)}; give a folder of "
            "this machine, and copy it when it is complete."
        )
    return local_path(path)


def check_name(path: Path) -> None:
    """Raise a :class:`MergeError` if a temporary file cannot have this name and a little more."""
    _checked(path.with_name(path.name + "x" * _ROOM) if path.name else path)


def _checked(path: Path) -> Path:
    """Return a path, or raise a :class:`MergeError` if no file can be called so."""
    try:
        os.lstat(path)
    except ValueError as error:
        raise MergeError(f"{str(path)!r} holds a zero byte, as no name of a file can; give another name.") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise MergeError(f"The name {path.name[:40]}… is too long for a file here; give a shorter one.") from error
    return path


@cache
def root_of_copies() -> Path:
    """Make the folder of the copies, for as long as this process lives."""
    root = Path(tempfile.mkdtemp(prefix="lightning_merge-")).resolve()
    atexit.register(partial(_remove_copies, root, os.getpid()))
    return root


def _remove_copies(root: Path, process: int) -> None:
    if os.getpid() == process:  # one that was forked has the same
        shutil.rmtree(root, ignore_errors=True)


def _split(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Split a URL into protocol and the rest; None for a path.

    Raises:
        MergeError: If there is no such kind of store.
    """
    text = os.fspath(path)
    found = _URL.fullmatch(text)
    if found is None:
        return None
    from fsspec import available_protocols
    from fsspec.registry import registry

    protocol, slashes, rest = found.groups()
    if (protocol := protocol.lower()) in (*available_protocols(), *registry):
        return protocol, rest
    if len(slashes) == 1:  # a folder whose name ends in a colon
        return None
    raise MergeError(f"{text} is in no kind of store that fsspec knows; check what stands before '://'.")
