"""Write a merged model while it is computed, tensor by tensor, completely or not at all.

Everything is written under another name in the same folder, ``.NAME.part``, and takes its place once it is complete and
on the disk: at any moment there is either what stood there before, or the whole new model. (A folder that replaces
another one on a system that cannot exchange two names is the exception: the old one is ``.NAME.old`` for a moment.)
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch import Tensor

from lightning_merge.checkpoints.atomic import put_in_place, remove, restore, swap, sync
from lightning_merge.checkpoints.contents import Beside
from lightning_merge.checkpoints.folders import CARD, carry_over, is_folder, is_ours, weights_name
from lightning_merge.checkpoints.part_file import PartFile, open_alone
from lightning_merge.checkpoints.reading import TORCH_SUFFIXES
from lightning_merge.checkpoints.writing import header_metadata, save_torch
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.processes import Processes

SHARD_SIZE = 5_000_000_000
"""The most bytes of one file of a folder, as Hugging Face divides models."""
_LOCK = ".lock"
"""A file in a folder that is being written, which keeps other merges out."""


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
        card: Callable[[], str] | None = None,
        beside: Beside = Beside(),  # noqa: B008, a frozen dataclass
    ) -> None:
        self.path = path.expanduser().resolve()  # the file behind a symbolic link is replaced, not the link
        self._tied, self._manifest, self._hyper_parameters = tied, manifest, hyper_parameters
        self._base = cast(Path, base)  # read for a folder alone, of which check_folder has seen that it has one
        self._is_folder = is_folder(path)
        self._resume = resume
        self._card = card
        self._beside = beside
        self._part = self.path.with_name(f".{self.path.name}.part")
        self._converted = self.path.with_name(f".{self.path.name}.part.torch")
        self._lock: BinaryIO | None = None
        self._in_place = False
        groups = _split(meta, shard_size) if self._is_folder else [list(meta)]
        names = _file_names(weights_name(self._base), len(groups)) if self._is_folder else [""]
        self._home = {name: i for i, group in enumerate(groups) for name in group}
        self._names = names
        self._files = [
            PartFile(
                self._part / name if name else self._part,
                {key: meta[key] for key in group},
                header_metadata({alias: owner for alias, owner in tied.items() if owner in group}, manifest),
                resume,
            )
            for name, group in zip(names, groups, strict=True)
        ]

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
        try:
            with processes.together(), self._in_words():
                if processes.is_first:
                    self._create()
            done = processes.gather([file.done for file in self._files])[0]
            try:
                with processes.together(), self._in_words():
                    if not processes.is_first:
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
            except BaseException:
                if processes.is_first and not self._resume and not self._in_place:
                    self._remove()
                raise
        finally:
            for opened in (*self._files, self._lock):
                if opened is not None:
                    opened.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor ``(…)`` to its place."""
        self._files[self._home[name]].write(name, tensor)

    def _create(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        restore(self.path)
        if self._is_folder:
            self._part.mkdir(exist_ok=True)
            self._lock = open_alone(self._part / _LOCK)
        try:
            for file in self._files:
                file.create()
            self._check_room()
        except OSError:
            if not self._resume:
                self._remove()
            raise
        for stray in self._strays():
            remove(stray)

    def _check_room(self) -> None:
        """Check that a file of torch, which is written from the complete safetensors file, has room beside it."""
        second = not self._is_folder and self.path.suffix in TORCH_SUFFIXES
        if second and shutil.disk_usage(self.path.parent).free < self._files[0].size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _strays(self) -> list[Path]:
        """Find the files that other merges into this output have left because they were killed."""
        if not self._is_folder:
            return [path for path in (self._converted,) if path.exists()]
        expected = {_LOCK, *self._names, *(path.name for file in self._files for path in file.journals())}
        return [path for path in self._part.iterdir() if path.name not in expected]

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
        if self._is_folder:
            self._complete_folder()
            return
        (file,) = self._files
        if self.path.suffix == ".safetensors":
            put_in_place(self._part, self.path)
            self._in_place = True
        else:
            stored = file.mapped()
            stored |= {alias: stored[owner] for alias, owner in self._tied.items()}
            save_torch(self._converted, self.path.suffix, stored, self._hyper_parameters, self._manifest, self._beside)
            put_in_place(self._converted, self.path)
            self._in_place = True
            self._part.unlink()
        file.forget()

    def _complete_folder(self) -> None:
        carry_over(self._base.parent, self._part)
        if len(self._files) > 1:
            total = sum(place.end - place.begin for file in self._files for place in file.places.values())
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: self._names[i] for name, i in self._home.items()},
            }
            text = json.dumps(index, indent=2) + "\n"
            (self._part / f"{weights_name(self._base)}.index.json").write_text(text, encoding="utf-8")
        if self._card is not None:
            (self._part / CARD).write_text(self._card(), encoding="utf-8")
        for file in self._files:
            file.forget()
        for path in self._part.iterdir():
            sync(path)
        sync(self._part)
        if self.path.is_dir() and any(self.path.iterdir()) and not is_ours(self.path):
            raise MergeError(
                f"The folder {self.path} was filled by somebody else meanwhile; nothing was changed there."
            )
        swap(self._part, self.path)
        self._in_place = True
        (self.path / _LOCK).unlink()

    def _remove(self) -> None:
        for file in self._files:
            file.remove()
        remove(self._part if self._is_folder else self._converted)

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = " What is finished was kept; start the same merge again to go on." if self._resume else ""
            raise MergeError(
                f"Could not write {self.path}: {error.strerror or error}; nothing was changed there.{kept}"
            ) from error


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
