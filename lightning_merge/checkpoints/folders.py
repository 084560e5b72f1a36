"""Folders as Hugging Face, timm and open_clip write them: each library loads what is merged from its own.

The files of the base's folder that are no weights (configuration, tokenizer, licence) are carried over, and the weights
get the name under which the library looks for them. ``AutoModel.from_pretrained(folder)``,
``timm.create_model("local-dir:FOLDER", pretrained=True)`` and
``open_clip.create_model_and_transforms("local-dir:FOLDER")`` read the result.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from lightning_merge.checkpoints.atomic import check_parent
from lightning_merge.checkpoints.reading import open_weights
from lightning_merge.checkpoints.weights import Weights
from lightning_merge.utilities.errors import MergeError

_CONFIGS = ("config.json", "open_clip_config.json")
_CARRIED = (
    "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*",
    "merges.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path means a folder: it is one, or has no suffix but perhaps a version (``Llama-3.2-1B``)."""
    path = Path(path).expanduser()
    return path.is_dir() or not path.suffix or path.suffix[1:2].isdigit()


def weights_name(base: Path) -> str:
    """Name the weights file of a merged folder: as the base's, or as the library calls its safetensors file.

    Args:
        base: The file (or index) of the base's weights. Of a folder that holds both a safetensors file and a pickle,
            :func:`lightning_merge.open_weights` reads the safetensors file, as the libraries do.
    """
    name = base.name.removesuffix(".index.json")
    if name.endswith(".safetensors"):
        return name
    return "open_clip_model.safetensors" if name.startswith("open_clip") else "model.safetensors"


def check_folder(path: str | os.PathLike[str], base: Path | None, inputs: Sequence[Weights] = ()) -> None:
    """Check that a merged model can be written to a folder: to be called before any work.

    Args:
        path: The folder.
        base: The file (or index) of the base's weights, beside which its configuration lies.
        inputs: What must not be replaced.

    Raises:
        MergeError: If something else is in that folder, or if the base has no configuration to carry over.
    """
    path = Path(path).expanduser()
    resolved = [weights.path.resolve() for weights in inputs if weights.path is not None]
    if any(path.resolve() in file.parents for file in resolved) and is_ours(path):
        raise MergeError(f"{path} holds one of the models to merge; give the merged model another name.")
    if base is None or not any((base.parent / config).is_file() for config in _CONFIGS):
        raise MergeError(
            f"{path} names a folder, as Hugging Face, timm and open_clip write them, but the base "
            f"({base or 'a state dict'}) has no {' or '.join(_CONFIGS)} beside it; give the base as such a folder, or "
            "end the output in .ckpt or .safetensors."
        )
    if path.exists() and not path.is_dir():
        raise MergeError(f"{path} is a file, so that no folder can be written there; give another name.")
    if path.is_dir() and any(path.iterdir()) and not is_ours(path):
        raise MergeError(f"The folder {path} holds something that was not merged here; give another name, or empty it.")
    check_parent(path)


def is_ours(folder: Path) -> bool:
    """Tell whether a folder holds a model that was merged here, which may be replaced."""
    return any("merge" in open_weights(file).header for file in folder.glob("*.safetensors"))


def carry_over(old: Path, new: Path) -> None:
    """Copy what a folder holds besides its weights: configuration, tokenizer, licence."""
    for file in sorted({file for pattern in _CARRIED for file in old.glob(pattern)}):
        if file.is_file():
            shutil.copyfile(file, new / file.name)


CARD = "README.md"
"""The name of a model card in a folder."""
