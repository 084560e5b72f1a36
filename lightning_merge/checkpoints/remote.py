"""Models in a store: URLs such as ``s3://…``, ``gs://…``, ``hf://…`` and ``memory://…``, through fsspec.

Every URL has a copy of the same name in a temporary folder of this process. What is read is fetched there first, once
for as long as the store says that it is the same; what is written is complete there before it is uploaded, so that
everything else here knows files alone. A file is uploaded under another name and then renamed; what stood there before
stays until then. A model's folder is uploaded to where nothing stood. (A store that renames by copying file by file may
keep a part of a new folder if this process is killed in that very moment.)
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from lightning_merge.checkpoints.files import first_line
from lightning_merge.checkpoints.paths import local_path, root_of_copies, url_of
from lightning_merge.utilities.errors import MergeError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

BESIDE = ("README.md", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*", "NOTICE*")
"""What is fetched with the weights of a folder."""
_seen: dict[Path, str] = {}  # of a copy: what the store says of the original


def fetch(source: str | os.PathLike[str], weights: Sequence[Sequence[str]] = ()) -> Path:
    """Return a local path to read from: the path itself, of a URL its copy, which is brought up to date.

    Args:
        source: A path or a URL.
        weights: What the weights of a folder may be called, most telling first: of those patterns that match anything,
            the first are fetched, with what else lies in the folder and is small.

    Raises:
        MergeError: If it cannot be fetched.
    """
    path = local_path(source)
    if (url := url_of(path)) is None:
        return path
    with _in_words(f"{url} cannot be read"):
        store, place = _store(url)
        if not store.exists(place):
            raise MergeError(f"There is no file or folder {url}; check the URL.")
        if store.isdir(place):
            for inner in _chosen(store, place, url, weights):
                _fetch_file(store, f"{place.rstrip('/')}/{inner}", path / inner)
        else:
            _fetch_file(store, place, path)
            for shard in _shards(store, place):
                _fetch_file(store, shard, path.with_name(PurePosixPath(shard).name))
    return path


def is_there(path: Path) -> bool:
    """Tell whether there is such a file, here or in the store whose copy it is."""
    if (url := url_of(path)) is None:
        return os.path.isfile(path)
    with _in_words(f"{url} cannot be read"):
        store, place = _store(url)
        return store.isfile(place)


def check_store(path: Path, is_folder: bool) -> None:
    """Raise a :class:`MergeError` if nothing can be written to a URL: an empty file is written there and removed.

    Args:
        path: The copy of a URL.
        is_folder: Whether a folder is to be written.
    """
    if (url := url_of(path)) is None:
        return
    with _in_words(f"{url} cannot be written"):
        store, place = _store(url)
        if store.isdir(place) if not is_folder else store.exists(place):
            there = "there is something already, and a folder in a store is not replaced" if is_folder else "a folder"
            raise MergeError(f"{url} cannot be written: {there}; give another name.")
        with _temporary(store, place) as temporary:
            store.pipe_file(temporary, b"")


def upload(new: Path, path: Path) -> None:
    """Bring a complete file or folder to the URL of which ``path`` is the copy; of another path, do nothing.

    Raises:
        OSError: If it cannot be done; what stood there is still there.
    """
    if (url := url_of(path)) is None:
        return
    try:
        store, place = _store(url)
        with _temporary(store, place) as temporary:
            if new.is_dir():
                _upload_folder(store, new, temporary, place)
            else:
                _upload_file(store, new, temporary)
                store.mv(temporary, place)
                _seen[path] = str(store.ukey(place))
    except Exception as error:  # of any store's library
        raise OSError(f"the store said: {first_line(error)}") from error


def _upload_file(store: AbstractFileSystem, file: Path, place: str) -> None:
    store.put_file(str(file), place)
    if (size := store.info(place)["size"]) != file.stat().st_size:
        raise OSError(f"{size} of {file.stat().st_size} bytes have arrived")


def _upload_folder(store: AbstractFileSystem, folder: Path, temporary: str, place: str) -> None:
    store.makedirs(temporary, exist_ok=True)
    for file in sorted(folder.iterdir()):
        if not file.name.startswith("."):  # a lock
            _upload_file(store, file, f"{temporary}/{file.name}")
    if store.exists(place):
        raise OSError("somebody else has written there meanwhile")
    try:
        store.mv(temporary, place, recursive=True)
    except BaseException:
        _remove(store, place)
        raise


@contextmanager
def _temporary(store: AbstractFileSystem, place: str) -> Iterator[str]:
    """Yield a name in the same folder of a store that nobody foresees; nothing of that name is left."""
    parent, _, name = place.rstrip("/").rpartition("/")
    temporary = f"{parent}/.{name}.{secrets.token_hex(8)}.part"
    if parent:
        store.makedirs(parent, exist_ok=True)
    try:
        yield temporary
    finally:
        _remove(store, temporary)


def _remove(store: AbstractFileSystem, place: str) -> None:
    with suppress(Exception):  # there is something more important to say
        if store.exists(place):
            store.rm(place, recursive=True)


def _chosen(store: AbstractFileSystem, folder: str, url: str, weights: Sequence[Sequence[str]]) -> list[str]:
    """Choose what to fetch of a folder, by the names in it."""
    start = len(store._strip_protocol(folder).rstrip("/")) + 1
    names = sorted(name[start:] for name in store.find(folder, maxdepth=2))

    def matching(patterns: Sequence[str]) -> list[str]:
        pairs = product(names, patterns)
        fits = (name for name, pattern in pairs if fnmatchcase(name, pattern) and name.count("/") == pattern.count("/"))
        return list(dict.fromkeys(fits))

    found: list[str] = next((inner for patterns in weights if (inner := matching(patterns))), [])
    if len(found) == 1 and found[0].endswith(".index.json"):
        found += matching([f"*{PurePosixPath(found[0].removesuffix('.index.json')).suffix}"])
    return list(dict.fromkeys([*matching(BESIDE), *found]))


def _shards(store: AbstractFileSystem, index: str) -> list[str]:
    """List the files that may be the shards of an index: all of its folder that have their suffix."""
    if not index.endswith(".index.json"):
        return []
    suffix = PurePosixPath(index.removesuffix(".index.json")).suffix
    beside = store.ls(index.rpartition("/")[0], detail=False)
    return [name for name in beside if name.endswith(suffix)]


def _fetch_file(store: AbstractFileSystem, place: str, copy: Path) -> None:
    """Copy a file from a store, unless the copy is of what is there now."""
    state = str(store.ukey(place))
    if _seen.get(copy) == state and copy.is_file():
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    part = copy.with_name(f"{copy.name}.{secrets.token_hex(8)}.part")
    try:
        size = store.info(place)["size"]
        store.get_file(place, str(part))
        if size is not None and part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size} of {size} bytes have arrived")
        os.replace(part, copy)
    finally:
        part.unlink(missing_ok=True)
    _seen[copy] = state


@contextmanager
def _in_words(start: str) -> Iterator[None]:
    """Turn what a store's library raises into a sentence."""
    try:
        yield
    except MergeError:
        raise
    except ImportError as error:
        raise MergeError(f"{start}: {first_line(error)} (pip install), or copy it to this machine.") from error
    except Exception as error:  # of any store's library
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        room = f"make room in {root_of_copies()}, or set TMPDIR"
        remedy = room if full else "check the URL, your rights and the connection"
        raise MergeError(f"{start}: {first_line(error)}; {remedy}.") from error


def _store(url: str) -> tuple[AbstractFileSystem, str]:
    from fsspec.core import url_to_fs

    store, place = url_to_fs(url)
    store.invalidate_cache()
    return store, place
