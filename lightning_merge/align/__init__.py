"""Permutation alignment: find a model's permutation groups, and put the channels of several models into one order."""

from lightning_merge.align.activation_matching import groups_without_features, match_activations
from lightning_merge.align.axes import Axis, Fixed, Free, Product, Sum
from lightning_merge.align.correlations import CrossMoments
from lightning_merge.align.find_symmetries import describe, find_symmetries
from lightning_merge.align.match_many import match_many
from lightning_merge.align.permutation import Permutation
from lightning_merge.align.straight_through import refine_straight_through
from lightning_merge.align.symmetries import Group, Symmetries
from lightning_merge.align.weight_matching import distance, match_weights, similarity

__all__ = [
    "Axis",
    "CrossMoments",
    "Fixed",
    "Free",
    "Group",
    "Permutation",
    "Product",
    "Sum",
    "Symmetries",
    "describe",
    "distance",
    "find_symmetries",
    "groups_without_features",
    "match_activations",
    "match_many",
    "match_weights",
    "refine_straight_through",
    "similarity",
]
