"""Recognize checkpoints that several processes wrote in parts, which must be put together before they can be merged."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_merge.utilities.errors import MergeError

_CONSOLIDATE = "python -m lightning.pytorch.utilities.consolidate_checkpoint"


_PART_OF_DEEPSPEED = re.compile(r".*mp_rank_\d+_(model|optim)_states\.pt")


def check_no_part(file: Path) -> None:
    """Raise a :class:`MergeError` where a file is one of the parts of a checkpoint, see :func:`check_consolidated`."""
    if file.suffix == ".distcp" or _PART_OF_DEEPSPEED.fullmatch(file.name):
        check_consolidated(file.parent)
        raise MergeError(
            f"{file} is a part of a checkpoint, and what is beside it is not the whole of it; copy the folder with all "
            "that Lightning has written there, and give that folder."
        )


def check_consolidated(folder: Path) -> None:
    """Raise a :class:`MergeError` where a folder holds a checkpoint in parts, with the command that puts it together.

    Args:
        folder: A folder that holds weights. FSDP and ModelParallel write ``.metadata`` beside their parts
            (``torch.distributed.checkpoint``); DeepSpeed writes ``*_model_states.pt`` into a folder of its own, and
            ``zero_to_fp32.py`` above it.
    """
    if (folder / ".metadata").is_file():
        whole = folder.with_name(f"{folder.name.removesuffix('.ckpt')}.consolidated.ckpt")
        raise MergeError(
            f"The folder {folder} holds a checkpoint in parts, as FSDP and ModelParallel write it; put it together "
            f"with `{_CONSOLIDATE} {folder} --output_file {whole}` and give that file."
        )
    if any(folder.glob("*_model_states.pt")) and (folder.parent / "zero_to_fp32.py").is_file():
        folder = folder.parent
    if (folder / "zero_to_fp32.py").is_file() or any(folder.glob("*/*_model_states.pt")):
        script, whole = folder / "zero_to_fp32.py", folder.with_name(f"{folder.name.removesuffix('.ckpt')}.bin")
        raise MergeError(
            f"The folder {folder} holds a checkpoint in parts, as DeepSpeed writes it; put it together with "
            f"`python {script} {folder} {whole}` and give what that has written."
        )
