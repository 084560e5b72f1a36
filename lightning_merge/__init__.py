"""Merge models that PyTorch Lightning trained: one expert per domain in, one model for all domains out.

>>> import lightning_merge as lm
>>> merged = lm.merge("base.ckpt", ["photo.ckpt", "sketch.ckpt"], lm.methods.SCORE())  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "callbacks" / "__init__.py").is_file() and (_CHECKOUT / "pyproject.toml").is_file():
    __path__.append(str(_CHECKOUT))  # an uninstalled checkout: `callbacks/` is `lightning_merge.callbacks`

if TYPE_CHECKING:  # what editors and type checkers see of the names that are imported when they are first used
    from lightning_merge import align, analysis, callbacks, data, evaluation, methods, models, repair, testing
    from lightning_merge.checkpoints import open_task_vector, open_weights, save_task_vector, save_weights
    from lightning_merge.data import Digits, DomainDataModule, DomainFolders, TaskArrays
    from lightning_merge.merging.merge import merge
    from lightning_merge.merging.merged import Merged
    from lightning_merge.merging.plan import Plan
    from lightning_merge.merging.planning import plan
    from lightning_merge.merging.sweeping import sweep
    from lightning_merge.methods import MergeMethod
    from lightning_merge.methods.base.matrices import Matrices
    from lightning_merge.models import Expert
    from lightning_merge.trainer import MergeCLI, MergeTrainer
    from lightning_merge.utilities import linalg
    from lightning_merge.utilities.errors import MergeError
    from lightning_merge.utilities.progress import show_progress

# Public names are imported when they are first used, so that `import lightning_merge` costs nothing.
_HOME = {
    "Digits": "lightning_merge.data",
    "DomainDataModule": "lightning_merge.data",
    "DomainFolders": "lightning_merge.data",
    "Expert": "lightning_merge.models",
    "Matrices": "lightning_merge.methods.base.matrices",
    "MergeCLI": "lightning_merge.trainer",
    "MergeError": "lightning_merge.utilities.errors",
    "MergeMethod": "lightning_merge.methods",
    "MergeTrainer": "lightning_merge.trainer",
    "Merged": "lightning_merge.merging.merged",
    "Plan": "lightning_merge.merging.plan",
    "TaskArrays": "lightning_merge.data",
    "merge": "lightning_merge.merging.merge",
    "open_task_vector": "lightning_merge.checkpoints",
    "open_weights": "lightning_merge.checkpoints",
    "plan": "lightning_merge.merging.planning",
    "save_task_vector": "lightning_merge.checkpoints",
    "save_weights": "lightning_merge.checkpoints",
    "show_progress": "lightning_merge.utilities.progress",
    "sweep": "lightning_merge.merging.sweeping",
}
_MODULES = {
    "align": "lightning_merge.align",
    "analysis": "lightning_merge.analysis",
    "callbacks": "lightning_merge.callbacks",
    "data": "lightning_merge.data",
    "evaluation": "lightning_merge.evaluation",
    "linalg": "lightning_merge.utilities.linalg",
    "methods": "lightning_merge.methods",
    "models": "lightning_merge.models",
    "repair": "lightning_merge.repair",
    "testing": "lightning_merge.testing",
}

__all__ = [
    "Digits",
    "DomainDataModule",
    "DomainFolders",
    "Expert",
    "Matrices",
    "MergeCLI",
    "MergeError",
    "MergeMethod",
    "MergeTrainer",
    "Merged",
    "Plan",
    "TaskArrays",
    "align",
    "analysis",
    "callbacks",
    "data",
    "evaluation",
    "linalg",
    "merge",
    "methods",
    "models",
    "open_task_vector",
    "open_weights",
    "plan",
    "repair",
    "save_task_vector",
    "save_weights",
    "show_progress",
    "sweep",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(_MODULES[name])
    raise AttributeError(f"module 'lightning_merge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
