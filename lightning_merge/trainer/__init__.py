"""``MergeTrainer``, the verbs that it has, and the command line."""

from lightning_merge.trainer.cli import MergeCLI
from lightning_merge.trainer.trainer import MergeTrainer

__all__ = ["MergeCLI", "MergeTrainer"]
