"""Write weights that are in memory to one file, completely or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.checkpoints.atomic import check_parent, replacing
from lightning_merge.checkpoints.contents import Beside
from lightning_merge.checkpoints.files import first_line
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.checkpoints.reading import TORCH_SUFFIXES, Weights
from lightning_merge.checkpoints.safetensors_format import SAFETENSORS_DTYPES, TIED
from lightning_merge.checkpoints.weights import from_memory
from lightning_merge.utilities.errors import MergeError, raise_all


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
        weights: The parameters and buffers by name; tied ones share their storage. What is no tensor
            (``_extra_state``) is kept as it is.
        hyper_parameters: The arguments of the LightningModule, for a ``.ckpt``.
        manifest: How these weights came to be; kept in a ``.ckpt`` and in the header of a ``.safetensors``.

    Returns:
        The path that was written.

    Raises:
        MergeError: If the file type is not known, or if the file cannot be written.
    """
    check_output(path)
    path = local_path(path)
    extra = {name: value for name, value in weights.items() if not isinstance(value, Tensor)}
    weights = {name: tensor.detach().cpu() for name, tensor in weights.items() if name not in extra}
    if extra and path.suffix == ".safetensors":
        raise MergeError(
            f"{next(iter(extra))!r} is no tensor, which a safetensors file cannot hold; end {path} in .ckpt or .pt."
        )
    with replacing(path) as file:
        if path.suffix == ".safetensors":
            tied = from_memory("the merged model", weights).tied
            stored = {name: tensor for name, tensor in weights.items() if name not in tied}
            _save_safetensors(file, stored, header_metadata(tied, manifest))
        else:
            save_torch(file, path.suffix, weights, hyper_parameters, manifest, Beside(state=extra))
    return path


def check_output(path: str | os.PathLike[str], inputs: Sequence[Weights] = ()) -> None:
    """Raise a :class:`MergeError` if weights cannot be written to ``path``: to be called before any work.

    Args:
        path: Where the weights are to be written.
        inputs: What must not be replaced.
    """
    path = local_path(path)
    for weights in inputs:
        if path.resolve() in (file.resolve() for file in weights.files):
            raise MergeError(f"{path} is one of the models to merge; give the merged model another name.")
    check_suffix(path)
    if path.is_dir():
        raise MergeError(f"Cannot write {path}: it is a folder; give the name of a file.")
    check_parent(path)


def check_dtypes(path: str | os.PathLike[str], meta: Mapping[str, Tensor]) -> None:
    """Raise a :class:`MergeError` if a file or folder of safetensors cannot hold a type; a file of torch holds any."""
    if Path(path).suffix in TORCH_SUFFIXES:
        return
    raise_all(
        [
            f"{name!r} is of type {tensor.dtype}, which a safetensors file cannot hold; end the output in .ckpt or .pt."
            for name, tensor in meta.items()
            if tensor.dtype not in SAFETENSORS_DTYPES.values()
        ]
    )


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raise a :class:`MergeError` if the name does not say what kind of weight file to write."""
    if Path(path).suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise MergeError(f"Cannot tell how to write {path}; end its name in .ckpt, .safetensors or .pt.")


def header_metadata(tied: Mapping[str, str], manifest: Mapping[str, Any] | None) -> dict[str, str]:
    """Build the metadata of a safetensors file: what its header says besides names and shapes."""
    return {"format": "pt", "merge": json.dumps(dict(manifest or {}))} | {TIED + a: owner for a, owner in tied.items()}


def save_torch(
    file: Path,
    suffix: str,
    weights: Mapping[str, Tensor],
    hyper_parameters: Mapping[str, Any] | None,
    manifest: Mapping[str, Any] | None,
    beside: Beside = Beside(),  # noqa: B008, a frozen dataclass
) -> None:
    """Write a file of torch: a checkpoint of Lightning if the suffix says so, else a plain state dict.

    Torch is given an open file, because it would write the name of a path into the file: the bytes are those of the
    content alone.

    Raises:
        OSError: If it cannot be written.
    """
    if suffix == ".ckpt":
        _torch_save(file, checkpoint_of(weights, hyper_parameters, manifest, beside))
    else:
        _torch_save(file, {**weights, **beside.state})


def checkpoint_of(
    weights: Mapping[str, Tensor],
    hyper_parameters: Mapping[str, Any] | None,
    manifest: Mapping[str, Any] | None,
    beside: Beside = Beside(),  # noqa: B008, a frozen dataclass
) -> dict[str, Any]:
    """Build the content of a checkpoint of Lightning.

    Args:
        weights: The tensors of its state dict ``(…)``.
        hyper_parameters: The arguments of the LightningModule.
        manifest: How these weights came to be.
        beside: What else it holds.
    """
    from importlib.metadata import version

    return {
        **beside.keys,
        "state_dict": {**weights, **beside.state},
        "pytorch-lightning_version": version("lightning"),
        "epoch": 0,
        "global_step": 0,
        "hyper_parameters": dict(hyper_parameters or {}),
        "merge": dict(manifest or {}),
    }


def save_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write a checkpoint of Lightning, see :func:`checkpoint_of`, completely or not at all.

    Raises:
        MergeError: If the file cannot be written.
    """
    path = local_path(path)
    with replacing(path) as file:
        _torch_save(file, dict(content))
    return path


def _torch_save(file: Path, content: dict[str, Any]) -> None:
    with file.open("wb") as stream:
        _or_os_error(lambda: torch.save(content, stream))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, and what the header is to say of them, to a safetensors file, completely or not at all.

    Raises:
        MergeError: If it cannot be written.
    """
    with replacing(path) as file:
        _save_safetensors(file, tensors, {"format": "pt", **metadata})


def _save_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _or_os_error(lambda: save_file(stored, file, dict(metadata)))


def _or_os_error(write: Callable[[], None]) -> None:
    """Write, and turn every failure into an OSError: a full disk is a RuntimeError of torch, a SafetensorError."""
    try:
        write()
    except Exception as error:
        raise OSError(first_line(error)) from error
