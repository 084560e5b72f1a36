"""Diagnostics of merged models: functions that return numbers."""

from lightning_merge.analysis.activations import SiteDifference, compare_activations
from lightning_merge.analysis.alignment import leading_subspace, projected_ratio, subspace_alignment_ratio
from lightning_merge.analysis.barrier import Barrier, interpolate, loss_barrier
from lightning_merge.analysis.embeddings import embed, project
from lightning_merge.analysis.landscape import Landscape, Plane, landscape, task_plane
from lightning_merge.analysis.normalized import NormalizedAccuracy, normalized_accuracy
from lightning_merge.analysis.running import loss_and_accuracy

__all__ = [
    "Barrier",
    "Landscape",
    "NormalizedAccuracy",
    "Plane",
    "SiteDifference",
    "compare_activations",
    "embed",
    "interpolate",
    "landscape",
    "leading_subspace",
    "loss_and_accuracy",
    "loss_barrier",
    "normalized_accuracy",
    "project",
    "projected_ratio",
    "subspace_alignment_ratio",
    "task_plane",
]
