"""Write weights, completely or not at all.

A file is written beside its final name and renamed once complete, so that a crash leaves no half of a file.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.checkpoints.files import first_line
from lightning_merge.checkpoints.reading import TORCH_SUFFIXES, Weights
from lightning_merge.checkpoints.safetensors_format import TIED
from lightning_merge.checkpoints.weights import from_memory
from lightning_merge.errors import MergeError


def save_weights(
    path: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    *,
    hyper_parameters: Mapping[str, Any] | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Path:
    """Write weights to one file, completely or not at all.

    Args:
        path: Ends in ``.ckpt`` (a checkpoint that ``LightningModule.load_from_checkpoint`` and
            ``trainer.test(ckpt_path=…)`` take), ``.safetensors``, or ``.pt`` / ``.pth`` / ``.bin`` (a state dict).
        weights: The parameters and buffers by name; tied ones share their storage.
        hyper_parameters: The arguments of the LightningModule, for a ``.ckpt``.
        manifest: How these weights came to be; kept in a ``.ckpt`` and in the header of a ``.safetensors``.

    Returns:
        The path that was written.

    Raises:
        MergeError: If the file type is not known, or if the file cannot be written.
    """
    check_output(path)
    path = Path(path).expanduser()
    weights = {name: tensor.detach().cpu() for name, tensor in weights.items()}
    if path.suffix == ".safetensors":
        _save_safetensors(path, weights, manifest)
    elif path.suffix == ".ckpt":
        import lightning

        content = {
            "state_dict": weights,
            "pytorch-lightning_version": lightning.__version__,
            "epoch": 0,
            "global_step": 0,
            "hyper_parameters": dict(hyper_parameters or {}),
            "merge": dict(manifest or {}),
        }
        _write(path, lambda file: torch.save(content, file))
    else:
        _write(path, lambda file: torch.save(weights, file))
    return path


def check_output(path: str | os.PathLike[str], inputs: Sequence[Weights] = ()) -> None:
    """Raise a :class:`MergeError` if weights cannot be written to ``path``: to be called before any work.

    Args:
        path: Where the weights are to be written.
        inputs: What must not be replaced.
    """
    path = Path(path).expanduser()
    for weights in inputs:
        if weights.path is not None and weights.path.resolve() == path.resolve():
            raise MergeError(f"{path} is one of the models to merge; give the merged model another name.")
    check_suffix(path)
    if path.is_dir():
        raise MergeError(f"Cannot write {path}: it is a folder; give the name of a file.")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise MergeError(f"Cannot write {path}: {existing} is no folder that can be written to.")


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Let a library write a file whose place ``path`` then takes."""
    with replacing(path) as file:
        try:
            write(file)
        except Exception as error:  # a full disk is a RuntimeError of torch and a SafetensorError of safetensors
            raise OSError(first_line(error)) from error


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raise a :class:`MergeError` if the name does not say what kind of weight file to write."""
    if Path(path).suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise MergeError(f"Cannot tell how to write {path}; end its name in .ckpt, .safetensors or .pt.")


def _save_safetensors(path: Path, weights: Mapping[str, Tensor], manifest: Mapping[str, Any] | None) -> None:
    from safetensors.torch import save_file

    tied = from_memory("the merged model", weights).tied
    metadata = {"format": "pt", "merge": json.dumps(dict(manifest or {}))}
    metadata |= {TIED + alias: owner for alias, owner in tied.items()}
    stored = {name: tensor.contiguous() for name, tensor in weights.items() if name not in tied}
    _write(path, lambda file: save_file(stored, file, metadata))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name in the folder of ``path``; when the block ends well, that file becomes ``path``.

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
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise MergeError(f"Could not write {path}: {error.strerror or error}; nothing was changed there.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
