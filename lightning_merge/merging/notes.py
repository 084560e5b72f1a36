"""What is to be known of a merge besides its numbers, in sentences."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning_merge.checkpoints import TORCH_SUFFIXES, Weights
from lightning_merge.checkpoints.contents import MARK, STATE, Beside


def notes_on_contents(
    models: Iterable[Weights], beside: Beside, output: str | os.PathLike[str] | None
) -> Iterator[str]:
    """Say which of several sets of weights in a file is taken, and what a merged checkpoint does not keep.

    Args:
        models: The base and the experts.
        beside: What is kept besides the tensors.
        output: Where the merged model is written; None for memory.
    """
    for model in models:
        if others := model.header.get("others"):
            taken = model.header.get("part", STATE)
            yield (
                f"{model.path} holds several sets of weights, of which {taken} is taken; for {' or '.join(others)} "
                f"give {model.path}{MARK}{others[0]}."
            )
    if beside.left_out:
        yield (
            f"Left out of the merged checkpoint, because a file may not choose code: {', '.join(beside.left_out)}; say "
            "it yourself where the model is loaded."
        )
    if beside.state and output is not None and Path(output).suffix not in TORCH_SUFFIXES:
        yield (
            f"{', '.join(beside.state)} in the state dict is no tensor, and a safetensors file holds tensors alone; "
            "end the output in .ckpt or .pt to keep it."
        )
