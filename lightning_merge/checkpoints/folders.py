"""Folders as Hugging Face, timm and open_clip write them: each library loads what is merged from its own.

The files of the base's folder that are no weights (configuration, tokenizer, licence) are carried over, and the weights
get the name under which the library looks for them. ``AutoModel.from_pretrained(folder)``,
``timm.create_model("local-dir:FOLDER", pretrained=True)`` and
``open_clip.create_model_and_transforms("local-dir:FOLDER")`` read the result.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_merge.checkpoints.atomic import check_parent
from lightning_merge.checkpoints.paths import local_path
from lightning_merge.checkpoints.private_folder import open_new, open_plain
from lightning_merge.checkpoints.replaced_folders import check_replaceable, is_listed
from lightning_merge.checkpoints.weights import Weights
from lightning_merge.utilities.errors import MergeError, problems_of, raise_all

_CONFIGS = ("config.json", "open_clip_config.json")
_CARRIED = (
    "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*",
    "merges.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*", "NOTICE*", "*.py",
)  # fmt: skip
_CODE = (
    ".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".bat", ".exe",
    ".pkl", ".pickle", ".joblib", ".dill", ".bin", ".ckpt", ".pt", ".pth",
)  # fmt: skip
"""What runs code, or may do so, when it is loaded."""


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path means a folder: it is one, or has no suffix but perhaps a version (``Llama-3.2-1B``)."""
    path = local_path(path)
    return os.path.isdir(path) or not path.suffix or path.suffix[1:2].isdigit()


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


def check_folder(
    path: str | os.PathLike[str], base: Path | None, inputs: Sequence[Weights] = (), carry_code: bool = False
) -> None:
    """Check that a merged model can be written to a folder: to be called before any work.

    Args:
        path: The folder.
        base: The file (or index) of the base's weights, beside which its configuration lies.
        inputs: What must not be replaced.
        carry_code: Whether code that lies beside the base's weights is to be carried over.

    Raises:
        MergeError: If something else is in that folder, or if the base has no configuration to carry over, or has links
            out of its folder.
    """
    path = local_path(path)
    resolved = [weights.path.resolve() for weights in inputs if weights.path is not None]
    if any(path.resolve() in file.parents for file in resolved) and is_listed(path):
        raise MergeError(f"{path} holds one of the models to merge; give the merged model another name.")
    if base is None or not any((base.parent / config).is_file() for config in _CONFIGS):
        raise MergeError(
            f"{path} names a folder, as Hugging Face, timm and open_clip write them, but the base "
            f"({base or 'a state dict'}) has no {' or '.join(_CONFIGS)} beside it; give the base as such a folder, or "
            "end the output in .ckpt or .safetensors."
        )
    if path.exists() and not path.is_dir():
        raise MergeError(f"{path} is a file, so that no folder can be written there; give another name.")
    check_parent(path, is_folder=True)
    problems = [p for file in to_carry(base.parent, carry_code) for p in problems_of(_behind, file)]
    raise_all(problems + (problems_of(check_replaceable, path) if path.is_dir() else []))


def to_carry(folder: Path, code: bool) -> list[Path]:
    """List what a folder holds besides its weights and is carried over: configuration, tokenizer, licence.

    Args:
        folder: The folder of the base.
        code: Whether code is carried over, too.
    """
    return [file for file in _beside(folder) if code or not _is_code(file)]


def left_out(folder: Path) -> list[str]:
    """List the names of the files of a folder that are carried over only if code is."""
    return [file.name for file in _beside(folder) if _is_code(file)]


def carry_over(files: Iterable[Path], new: Path) -> None:
    """Copy files into a new folder.

    Raises:
        MergeError: If one of them is a link out of its folder.
        OSError: If one of them cannot be copied.
    """
    for file in files:
        with open_plain(_behind(file)) as source, open_new(new / file.name) as copy:
            shutil.copyfileobj(source, copy)


def _beside(folder: Path) -> list[Path]:
    found = {file for pattern in _CARRIED for file in folder.glob(pattern)}
    return sorted(file for file in found if file.is_file() or file.is_symlink())


def _is_code(file: Path) -> bool:
    return file.suffix.lower() in _CODE


def _behind(file: Path) -> Path:
    """Find the file that a name in a model's folder stands for; the Hugging Face cache alone has links out of one.

    Raises:
        MergeError: If it is a link that leads out of the folder.
    """
    folder, real = file.parent.resolve(), file.resolve()
    repository = folder.parent.parent
    is_cache = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    if folder in real.parents or (is_cache and real.parent == repository / "blobs"):
        return real
    raise MergeError(
        f"{file} is a link that leads out of the model's folder, to {real}, so that it is not carried over into the "
        "merged one; replace it by the file itself if that belongs to the model, or remove it."
    )


CARD = "README.md"
"""The name of a model card in a folder."""
