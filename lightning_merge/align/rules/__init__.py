"""Rules for the dimensions of ATen's operators: one small function for each operator.

An operator that is not in the table fixes every dimension that it touches: fewer symmetries, never wrong ones.
"""

from lightning_merge.align.rules import contractions, elementwise, shapes
from lightning_merge.align.rules.registry import RULES, Call, Dims, Unsupported, tensors

__all__ = ["RULES", "Call", "Dims", "Unsupported", "contractions", "elementwise", "shapes", "tensors"]
