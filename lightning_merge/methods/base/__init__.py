"""The interface of merging methods, and what their rules are given."""

from lightning_merge.methods.base.checks import check_choice, check_range, check_weight_count, check_weights
from lightning_merge.methods.base.context import Context
from lightning_merge.methods.base.method import MergeMethod, Paper

__all__ = ["Context", "MergeMethod", "Paper", "check_choice", "check_range", "check_weight_count", "check_weights"]
