"""Folders as Hugging Face writes them: ``from_pretrained(folder)`` takes what :func:`save_folder` makes.

The files of the base's folder that are no weights (configuration, tokenizer, licence) are carried over.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_merge.checkpoints import open_weights, save_weights
from lightning_merge.errors import MergeError

_WEIGHTS = "model.safetensors"
_CARRIED = (
    "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*",
    "merges.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path means a folder: it is one, or its name has no suffix but perhaps a version (``Llama-3.2-1B``)."""
    path = Path(path).expanduser()
    return path.is_dir() or not path.suffix or path.suffix[1:2].isdigit()


def check_folder(path: str | os.PathLike[str], base: Path | None) -> None:
    """See that a merged model can be written to a folder, before there is one.

    Args:
        path: The folder.
        base: The file (or index) of the base's weights, beside which its configuration lies.

    Raises:
        MergeError: If something else is in that folder, or if the base has no configuration to carry over.
    """
    path = Path(path).expanduser()
    if base is None or not (base.parent / "config.json").is_file():
        raise MergeError(
            f"{path} names a folder, as Hugging Face writes them, but the base ({base or 'a state dict'}) has no "
            "config.json beside it; give the base as such a folder, or end the output in .ckpt or .safetensors."
        )
    if path.exists() and not path.is_dir():
        raise MergeError(f"{path} is a file, so that no folder can be written there; give another name.")
    if path.is_dir() and any(path.iterdir()) and not is_ours(path):
        raise MergeError(f"The folder {path} holds something that was not merged here; give another name, or empty it.")


def is_ours(folder: Path) -> bool:
    return (folder / _WEIGHTS).is_file() and "merge" in open_weights(folder / _WEIGHTS).header


def weights_name(base: Path | None) -> str:
    return _WEIGHTS


def carry_over(old: Path, new: Path) -> None:
    for file in sorted({file for pattern in _CARRIED for file in old.glob(pattern)}):
        if file.is_file():
            shutil.copyfile(file, new / file.name)


def save_folder(
    path: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    base: Path | None,
    manifest: Mapping[str, Any] | None = None,
) -> Path:
    """Write weights to a Hugging Face folder, completely or not at all; what was merged there before is replaced.

    Args:
        path: The folder.
        weights: The parameters and buffers by name; of tied ones, the first name is stored.
        base: The file of the base's weights; what lies beside it is carried over.
        manifest: How these weights came to be; kept in the header of ``model.safetensors``.

    Returns:
        The folder.

    Raises:
        MergeError: If the folder cannot be written, see :func:`check_folder`.
    """
    check_folder(path, base)
    path = Path(path).expanduser().resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
            new, old = Path(temporary) / "new", Path(temporary) / "old"
            new.mkdir()
            for file in sorted({file for pattern in _CARRIED for file in base.parent.glob(pattern)}):
                if file.is_file():
                    shutil.copyfile(file, new / file.name)
            save_weights(new / _WEIGHTS, weights, manifest=manifest)
            if path.exists():
                path.rename(old)
            try:
                new.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
    except OSError as error:
        raise MergeError(f"Could not write the folder {path}: {error.strerror or error}.") from error
    return path
