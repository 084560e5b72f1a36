"""Weights on the Hugging Face Hub, as ``hf-hub:OWNER/NAME`` or ``hf-hub:OWNER/NAME@REVISION``."""

from __future__ import annotations

from pathlib import Path

from lightning_merge.checkpoints.files import first_line
from lightning_merge.checkpoints.remote import BESIDE
from lightning_merge.utilities.errors import MergeError

HUB = "hf-hub:"
"""What stands before the name of a model on the Hub, as in timm and open_clip."""


def download(source: str) -> Path:
    """Fetch a model's weights and what lies beside them, or find them in the cache.

    Pickles are fetched only if there is no safetensors file.

    Args:
        source: ``hf-hub:OWNER/NAME``, with ``@REVISION`` if it is not the newest.

    Returns:
        The folder they are in.

    Raises:
        MergeError: If there is no such model, or if the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = source.removeprefix(HUB).partition("@")
    try:
        for weights in ("*.safetensors", "*.bin"):
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=[weights, *BESIDE]))
            if any(folder.glob(weights)):
                return folder
    except Exception as error:  # of the library, of the network, or of the name
        raise MergeError(
            f"{source} cannot be fetched from the Hugging Face Hub ({first_line(error)}); check its name and the "
            "connection, or download it and give the folder."
        ) from error
    raise MergeError(f"{source} holds neither a .safetensors nor a .bin file.")
