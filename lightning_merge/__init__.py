"""Merge models that PyTorch Lightning trained: one expert per domain in, one model for all domains out.

>>> import lightning_merge as lm
>>> merged = lm.merge("base.ckpt", ["photo.ckpt", "sketch.ckpt"], lm.methods.SCORE())  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "callbacks" / "__init__.py").is_file() and (_CHECKOUT / "pyproject.toml").is_file():
    __path__.append(str(_CHECKOUT))  # an uninstalled checkout: `callbacks/` is `lightning_merge.callbacks`

# Public names are imported when they are first used, so that `import lightning_merge` costs nothing.
_HOME = {
    "Digits": "lightning_merge.data",
    "DomainDataModule": "lightning_merge.data",
    "DomainFolders": "lightning_merge.data",
    "Expert": "lightning_merge.models",
    "Matrices": "lightning_merge.matrices",
    "MergeCLI": "lightning_merge.cli",
    "MergeError": "lightning_merge.errors",
    "MergeMethod": "lightning_merge.methods",
    "MergeTrainer": "lightning_merge.trainer",
    "Merged": "lightning_merge.merged",
    "Plan": "lightning_merge.plans",
    "TaskArrays": "lightning_merge.data",
    "merge": "lightning_merge.merging",
    "open_task_vector": "lightning_merge.task_vector_files",
    "open_weights": "lightning_merge.checkpoints",
    "plan": "lightning_merge.planning",
    "save_task_vector": "lightning_merge.task_vector_files",
    "save_weights": "lightning_merge.checkpoints",
    "show_progress": "lightning_merge.progress",
    "sweep": "lightning_merge.sweeping",
}
_MODULES = ("align", "analysis", "callbacks", "data", "evaluation", "linalg", "methods", "models", "repair", "testing")

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(f"lightning_merge.{name}")
    raise AttributeError(f"module 'lightning_merge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
