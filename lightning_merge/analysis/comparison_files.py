"""Write and read comparisons of experts."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_merge.analysis.comparison import Comparison
from lightning_merge.checkpoints import write_text
from lightning_merge.utilities.errors import MergeError

COMPARISON = "comparison.json"


def save_comparison(comparison: Comparison, folder: Path) -> None:
    """Write ``comparison.json`` into a folder."""
    write_text(folder / COMPARISON, json.dumps(comparison.to_dict()) + "\n")


def read_comparison(folder: Path) -> Comparison | None:
    """Read the ``comparison.json`` of a folder; None if there is none."""
    path = folder / COMPARISON
    try:
        return Comparison.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
    except (ValueError, KeyError, TypeError) as error:
        raise MergeError(f"{path} cannot be read ({error}); delete it, and the same command makes it again.") from error
