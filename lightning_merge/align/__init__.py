"""Permutation alignment: find a model's permutation groups, and put the channels of several models into one order."""

from lightning_merge.align.axes import Axis, Fixed, Free, Product, Sum
from lightning_merge.align.find_symmetries import describe, find_symmetries
from lightning_merge.align.permutation import Permutation
from lightning_merge.align.symmetries import Group, Symmetries

__all__ = [
    "Axis",
    "Fixed",
    "Free",
    "Group",
    "Permutation",
    "Product",
    "Sum",
    "Symmetries",
    "describe",
    "find_symmetries",
]
