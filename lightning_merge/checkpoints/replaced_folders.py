"""Replace a folder that a merge has written, and nothing else.

A merge notes, in the header of the first safetensors file of a folder, the names of all files that it writes there. A
later merge may replace the folder if it holds nothing but these, and what appears in it at the last moment is kept.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from lightning_merge.checkpoints.atomic import exchange_names, keep_mode, sync
from lightning_merge.checkpoints.private_folder import SWAPPED, is_plain, remove_private, written_for
from lightning_merge.checkpoints.remote import upload
from lightning_merge.checkpoints.safetensors_format import read_header
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.schemas import load_json

NEW = "new"
"""The new folder, in a private one, from when it is put together until it takes its place."""
_FILES = "files"
"""In the metadata, the names of the files of the folder."""


def list_files(names: Iterable[str]) -> dict[str, str]:
    """Note the names of the files of a folder as metadata of its first safetensors file."""
    return {_FILES: json.dumps(sorted(names))}


def is_listed(folder: Path) -> bool:
    """Tell whether a folder holds the list of what a merge has written there."""
    return bool(_listed(folder))


def check_replaceable(folder: Path) -> None:
    """Raise a :class:`MergeError` that names what a folder holds and no merge has written there."""
    strange = _strange(folder)
    if not strange:
        return
    shown = ", ".join(strange[:20]) + (f" and {len(strange) - 20} more" if len(strange) > 20 else "")
    raise MergeError(
        f"The folder {folder} holds {shown}: not in the list that a merge leaves of what it has written into a folder. "
        "Give another name, or empty the folder."
    )


def put_folder_in_place(private: Path, path: Path) -> None:
    """Put the new folder that is in a private one in the place of an old one, which is left in the private one.

    Linux exchanges two names in one step. Elsewhere the old folder is moved away first, and back if that fails.

    Raises:
        OSError: If it cannot be done; the old folder is still there.
    """
    new, swapped = private / NEW, private / SWAPPED
    upload(new, path)
    if not path.exists():
        new.rename(path)
    else:
        for file in (new, *new.iterdir()):
            keep_mode(file, path if file == new else path / file.name)
        new.rename(swapped)
        if not exchange_names(swapped, path):
            swapped.rename(new)
            path.rename(swapped)
            try:
                new.rename(path)
            except OSError:
                swapped.rename(path)
                raise
    sync(path.parent)


def restore(private: Sequence[Path], path: Path) -> None:
    """Bring back the folder that :func:`put_folder_in_place` had moved away when it was killed."""
    for folder in private:
        if not path.exists() and (folder / SWAPPED).is_dir():
            (folder / SWAPPED).rename(path)


def discard(private: Path, path: Path) -> None:
    """Remove a private folder; what no merge has written into the folder that was replaced goes into the new one."""
    swapped = private / SWAPPED
    with suppress(OSError):  # what cannot be removed now is removed by the next merge
        if swapped.is_dir() and path.is_dir():
            for name in _strange(swapped):
                taken = os.path.lexists(path / name)
                (swapped / name).rename(path / (f"{name}.{secrets.token_hex(4)}" if taken else name))
            swapped.rename(private / "old")
        remove_private(private)


def _strange(folder: Path) -> list[str]:
    """List the names of what is in a folder, but for files that a merge has listed and what it left when killed."""
    listed = _listed(folder)
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if not (entry.name in listed and is_plain(entry)) and written_for(entry) not in listed
    )


def _listed(folder: Path) -> set[str]:
    for file in sorted(folder.glob("*.safetensors")):
        with suppress(MergeError, ValueError):
            names = load_json(read_header(file)[0].get(_FILES, "[]")) if is_plain(file) else []
            if isinstance(names, list) and file.name in names:
                return {name for name in names if isinstance(name, str)}
    return set()
