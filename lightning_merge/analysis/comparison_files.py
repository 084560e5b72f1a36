"""Write and read comparisons of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_merge.analysis.comparison import Comparison
from lightning_merge.checkpoints import write_text
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.schemas import read_json

COMPARISON = "comparison.json"


def save_comparison(comparison: Comparison, folder: Path) -> None:
    """Write ``comparison.json`` into a folder."""
    write_text(folder / COMPARISON, json.dumps(comparison.to_dict()) + "\n")


def read_comparison(folder: Path) -> Comparison | None:
    """Read the ``comparison.json`` of a folder; None if there is none."""
    path, remedy = folder / COMPARISON, "delete it, and the same command makes it again"
    if not path.exists():
        return None
    content = read_json(path, dict[str, Any], "comparison of experts", remedy)
    try:
        return Comparison.from_dict(content)
    except MergeError as error:
        raise MergeError(f"{path} cannot be read; {remedy}. {error}") from error
