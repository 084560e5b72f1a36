"""Write a merged model while it is computed, tensor by tensor, completely or not at all.

Everything is written under another name in the same folder, ``.NAME.part``, and takes its place once it is complete and
on the disk: at any moment there is either what stood there before, or the whole new model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from lightning_merge.checkpoints import (
    PartFile,
    exchange,
    header_metadata,
    open_alone,
    put_in_place,
    save_torch,
    sync_folder,
)
from lightning_merge.errors import MergeError
from lightning_merge.folders import carry_over, is_folder, is_ours, weights_name
from lightning_merge.sharing import Processes

SHARD_SIZE = 5_000_000_000
"""The most bytes of one file of a folder, as Hugging Face divides models."""
_LOCK = ".lock"
"""A file in a folder that is being written, which keeps other merges out."""


class StreamedModel:
    """A model that is being written to a file or a folder.

    Args:
        path: The file (``.safetensors``, ``.ckpt``, ``.pt``, …) or the folder.
        meta: A tensor for every name, of which only shape and dtype count.
        tied: Names that share a tensor with another one: ``{alias: name}``.
        manifest: How the model came to be.
        hyper_parameters: The arguments of the LightningModule, for a ``.ckpt``.
        base: The file of the base's weights; a folder gets what lies beside it.
        resume: Go on with what an interrupted run has finished, and keep what is finished if this one is interrupted.
        shard_size: The most bytes of one file in a folder.
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
    ) -> None:
        self.path = path.expanduser().absolute()
        self._tied, self._manifest, self._hyper_parameters, self._base = tied, manifest, hyper_parameters, base
        self._is_folder = is_folder(path)
        self._resume = resume
        self._part = self.path.with_name(f".{self.path.name}.part")
        self._converted = self.path.with_name(f".{self.path.name}.part.torch")
        self._lock: BinaryIO | None = None
        groups = _split(meta, shard_size) if self._is_folder else [list(meta)]
        names = _file_names(weights_name(base), len(groups)) if self._is_folder else [""]
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
        """What an earlier run has finished."""
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
                with processes.together(), self._in_words():
                    if processes.is_first:
                        self._complete()
            except BaseException:
                if processes.is_first and not self._resume:
                    self._remove()
                raise
        finally:
            for file in (*self._files, self._lock):
                if file is not None:
                    file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place."""
        self._files[self._home[name]].write(name, tensor)

    def _create(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._is_folder:
            self._part.mkdir(exist_ok=True)
            self._lock = open_alone(self._part / _LOCK)
        try:
            for file in self._files:
                file.create()
        except OSError:
            if not self._resume:
                self._remove()
            raise
        for stray in self._strays():
            stray.unlink()

    def _strays(self) -> list[Path]:
        """What other merges into this output have left where they were killed."""
        if not self._is_folder:
            return [path for path in (self._converted,) if path.exists()]
        known = (_LOCK, *self._names)
        return [
            path
            for path in self._part.iterdir()
            if path.name not in known and not (self._resume and path.name.startswith(tuple(self._names)))
        ]

    def _complete(self) -> None:
        if self._is_folder:
            self._complete_folder()
            return
        (file,) = self._files
        if self.path.suffix == ".safetensors":
            put_in_place(self._part, self.path)
        else:
            stored = file.mapped()
            stored |= {alias: stored[owner] for alias, owner in self._tied.items()}
            save_torch(self._converted, self.path.suffix, stored, self._hyper_parameters, self._manifest)
            put_in_place(self._converted, self.path)
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
        for file in self._files:
            file.forget()
        sync_folder(self._part)
        if self.path.is_dir() and any(self.path.iterdir()) and not is_ours(self.path):
            raise MergeError(
                f"The folder {self.path} was filled by somebody else meanwhile; nothing was changed there."
            )
        exchange(self._part, self.path)
        (self.path / _LOCK).unlink()

    def _remove(self) -> None:
        for file in self._files:
            file.remove()
        if self._is_folder:
            shutil.rmtree(self._part, ignore_errors=True)
        else:
            self._converted.unlink(missing_ok=True)

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
    """Divide names, in their order, so that the tensors of each group have no more bytes than ``most`` (or are one)."""
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
    """The names of a model's files: ``model.safetensors``, or ``model-00001-of-00003.safetensors`` and so on."""
    if count == 1:
        return [whole]
    stem, _, suffix = whole.rpartition(".")
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.{suffix}" for i in range(count)]
