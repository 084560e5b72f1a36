"""Write a merged model while it is computed, tensor by tensor, completely or not at all.

Everything is written into a private folder beside the output, and takes its place once it is complete and on the disk:
at any moment there is either what stood there before, or the whole new model. (A folder that replaces another one on a
system that cannot exchange two names is the exception: the old one is in the private folder for a moment.)
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from lightning_merge.checkpoints.atomic import put_in_place, sync
from lightning_merge.checkpoints.contents import Beside
from lightning_merge.checkpoints.folders import CARD, carry_over, is_folder, left_out, to_carry, weights_name
from lightning_merge.checkpoints.part_file import PartFile
from lightning_merge.checkpoints.private_folder import alone, make_private, open_new, private_folders, remove
from lightning_merge.checkpoints.reading import TORCH_SUFFIXES
from lightning_merge.checkpoints.replaced_folders import (
    NEW,
    check_replaceable,
    discard,
    list_files,
    put_folder_in_place,
    restore,
)
from lightning_merge.checkpoints.writing import header_metadata, save_torch
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.processes import Processes

SHARD_SIZE = 5_000_000_000
"""The most bytes of one file of a folder, as Hugging Face divides models."""


class StreamedModel:
    """A model that is being written to a file or a folder.

    Args:
        path: The file (``.safetensors``, ``.ckpt``, ``.pt``, …) or the folder.
        meta: A tensor ``(…)`` for every name, of which only shape and dtype count.
        tied: Names that share a tensor with another one: ``{alias: name}``.
        manifest: How the model came to be.
        hyper_parameters: The arguments of the LightningModule, for a ``.ckpt``.
        base: The file of the base's weights; a folder gets what lies beside it.
        resume: Go on with what an interrupted run has finished, and keep what is finished if this one is interrupted.
        shard_size: The most bytes of one file in a folder.
        carry_code: Whether a folder gets the code that lies beside the base's weights, too.
        later: The names of files that will be put into the folder when it is complete.
        card: Gives the text of the model card of a folder, once the folder is complete; None for no card.
        beside: What else a file of torch is to hold.
    """

    def __init__(
        self,
        path: Path,
        meta: Mapping[str, Tensor],
        tied: Mapping[str, str],
        manifest: Mapping[str, Any],
        hyper_parameters: Mapping[str, Any],
        base: Path | None,
        resume: bool,
        shard_size: int,
        carry_code: bool = False,
        later: Sequence[str] = (),
        card: Callable[[], str] | None = None,
        beside: Beside = Beside(),  # noqa: B008, a frozen dataclass
    ) -> None:
        self.path = path.expanduser().resolve()  # the file behind a symbolic link is replaced, not the link
        self._suffix = path.suffix  # as the user has written it, wherever a link leads to
        self._meta, self._tied, self._manifest, self._hyper_parameters = meta, tied, manifest, hyper_parameters
        self._base = cast(Path, base)  # read for a folder alone, of which check_folder has seen that it has one
        self._is_folder = is_folder(path)
        self._resume = resume
        self._carry_code = carry_code
        self._card = card
        self._beside = beside
        self._carried = to_carry(self._base.parent, carry_code) if self._is_folder else []
        self._groups = _split(meta, shard_size) if self._is_folder else [list(meta)]
        self._home = {name: i for i, group in enumerate(self._groups) for name in group}
        whole = weights_name(self._base) if self._is_folder else "model.safetensors"
        self._names = _file_names(whole, len(self._groups))
        self._index = f"{whole}.index.json" if len(self._names) > 1 else None
        self._later = [*later, *([CARD] if card is not None else []), *([self._index] if self._index else [])]
        self._part: Path | None = None
        self._files: list[PartFile] = []
        self._in_place = False

    @property
    def done(self) -> set[str]:
        """The names of the tensors that an earlier run has finished."""
        return {name for file in self._files for name in file.done}

    @contextmanager
    def open(self, processes: Processes) -> Iterator[None]:
        """Reserve the space, let the processes write, and put the model in its place when the block ends well.

        Raises:
            MergeError: If it cannot be written; what stood there before is still there.
        """
        with ExitStack() as held:
            with processes.together(), self._in_words():
                if processes.is_first:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    surely = held.enter_context(alone(self.path))
                held.callback(self._close, processes.is_first)
                if processes.is_first:
                    self._create(surely)
            self._part, self._carried, done = processes.gather(
                (self._part, self._carried, [file.done for file in self._files])
            )[0]
            with processes.together(), self._in_words():
                if not processes.is_first:
                    self._files = self._lay_out(self._part)
                    for file, finished in zip(self._files, done, strict=True):
                        file.join(processes.rank, finished)
                yield
                for file in self._files:
                    file.sync()
            written = processes.gather([file.checksums for file in self._files])
            with processes.together(), self._in_words():
                if processes.is_first:
                    self._check(written[1:])
                    self._complete()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor ``(…)`` to its place."""
        self._files[self._home[name]].write(name, tensor)

    def _create(self, surely: bool) -> None:
        """Begin to write, or go on with what an earlier run of this merge has left.

        Args:
            surely: Whether what is there was left behind, and no other merge is writing it now.
        """
        left = private_folders(self.path)
        if self._is_folder:
            restore(left, self.path)
        begun = [folder for folder in left if self._resume and self._is_begun(folder)]
        self._part = begun[0] if begun else make_private(self.path)
        for folder in left:
            if folder != self._part and surely:
                discard(folder, self.path)
        self._files = self._lay_out(self._part)
        for file in self._files:
            file.create()
        self._check_room()
        if skipped := left_out(self._base.parent) if self._is_folder and not self._carry_code else []:
            warnings.warn(
                f"{', '.join(skipped)} beside the base's weights can run code, and was not carried over into "
                f"{self.path}; read it, and give carry_code=True if it belongs there.",
                stacklevel=2,
            )

    def _lay_out(self, folder: Path) -> list[PartFile]:
        """Lay out the safetensors files in a private folder; the first one of a folder lists all of its files."""
        names = [*self._names, *self._later, *(file.name for file in self._carried)]
        return [
            PartFile(
                folder / name,
                {key: self._meta[key] for key in group},
                header_metadata({a: owner for a, owner in self._tied.items() if owner in group}, self._manifest)
                | (list_files(names) if self._is_folder and name == self._names[0] else {}),
                self._resume,
            )
            for name, group in zip(self._names, self._groups, strict=True)
        ]

    def _is_begun(self, folder: Path) -> bool:
        """Tell whether this merge has begun to write into a private folder; what was put together is taken apart."""
        for name in self._names:
            if (folder / NEW / name).exists():
                (folder / NEW / name).rename(folder / name)
        remove(folder / NEW)
        return self._lay_out(folder)[0].is_begun()

    def _check_room(self) -> None:
        """Check that a file of torch, which is written from the complete safetensors file, has room beside it."""
        second = not self._is_folder and self._suffix in TORCH_SUFFIXES
        if second and shutil.disk_usage(self.path.parent).free < self._files[0].size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _check(self, others: list[list[dict[str, int]]]) -> None:
        """Check that the file holds what the other processes have written to it."""
        for written in others:
            for file, checksums in zip(self._files, written, strict=True):
                for name, checksum in checksums.items():
                    if file.checksum(name) != checksum:
                        raise MergeError(
                            f"{name!r} is not in {file.path} as another process has written it: its file system does "
                            "not let several processes write one file. Merge with one process, or to another disk."
                        )

    def _complete(self) -> None:
        assert self._part is not None
        for written in self._files:
            written.close()  # an open file cannot be renamed or removed everywhere
        if self._is_folder:
            self._put_together(self._part / NEW)
            if self.path.is_dir():
                check_replaceable(self.path)
            put_folder_in_place(self._part, self.path)
        else:
            file = self._files[0].path
            if self._suffix != ".safetensors":
                file = self._part / "converted"
                stored = self._files[0].mapped()
                stored |= {alias: stored[owner] for alias, owner in self._tied.items()}
                save_torch(file, self._suffix, stored, self._hyper_parameters, self._manifest, self._beside)
            put_in_place(file, self.path)
        self._in_place = True

    def _put_together(self, folder: Path) -> None:
        """Put all files of the new folder into it, on the disk."""
        folder.mkdir()
        carry_over(self._carried, folder)
        if self._index is not None:
            total = sum(place.end - place.begin for file in self._files for place in file.places.values())
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: self._names[i] for name, i in self._home.items()},
            }
            _write(folder / self._index, json.dumps(index, indent=2) + "\n")
        if self._card is not None:
            _write(folder / CARD, self._card())
        for file in self._files:
            file.path.rename(folder / file.path.name)
        for path in (*folder.iterdir(), folder):
            sync(path)

    def _close(self, is_first: bool) -> None:
        """Close all files, and remove what was written into the private folder unless a later run is to go on there."""
        for file in self._files:
            file.close()
        if is_first and self._part is not None and (self._in_place or not self._resume):
            discard(self._part, self.path)

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = " What is finished was kept; start the same merge again to go on." if self._resume else ""
            raise MergeError(
                f"Could not write {self.path}: {error.strerror or error}; nothing was changed there.{kept}"
            ) from error


def _write(path: Path, text: str) -> None:
    with open_new(path) as file:
        file.write(text.encode())


def _split(meta: Mapping[str, Tensor], most: int) -> list[list[str]]:
    """Divide names, in their order, into groups whose tensors have at most ``most`` bytes (or are a single one)."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in meta.items():
        nbytes = tensor.numel() * tensor.element_size()
        if groups[-1] and size + nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    return groups


def _file_names(whole: str, count: int) -> list[str]:
    """List the names of a model's files: ``model.safetensors``, or ``model-00001-of-00003.safetensors`` and so on."""
    if count == 1:
        return [whole]
    stem, _, suffix = whole.rpartition(".")
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.{suffix}" for i in range(count)]
