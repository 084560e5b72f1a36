"""Diagnostics of merged models: functions that return numbers."""

from lightning_merge.analysis.activations import SiteDifference, compare_activations
from lightning_merge.analysis.agreement import distances, sign_conflicts
from lightning_merge.analysis.alignment import (
    RankRule,
    leading_subspace,
    pairwise_alignment,
    projected_ratio,
    subspace_alignment_ratio,
)
from lightning_merge.analysis.angles import pairwise_angles, principal_angles
from lightning_merge.analysis.barrier import Barrier, interpolate, loss_barrier
from lightning_merge.analysis.compare_experts import compare_experts
from lightning_merge.analysis.comparison import Comparison
from lightning_merge.analysis.embeddings import embed, project
from lightning_merge.analysis.groups import GROUPS, group_of, grouped
from lightning_merge.analysis.landscape import Landscape, Plane, landscape, task_plane
from lightning_merge.analysis.losses import loss_and_accuracy
from lightning_merge.analysis.normalized import NormalizedAccuracy, normalized_accuracy
from lightning_merge.analysis.probe import linear_probe
from lightning_merge.analysis.records import GroupProfile, MatrixComparison, ParameterComparison
from lightning_merge.analysis.score_map import ScoreMap, score_map
from lightning_merge.analysis.spectra import effective_rank, energy_share, singular_values, stable_rank
from lightning_merge.utilities.inner_products import cosines, inner_products, norms

__all__ = [
    "GROUPS",
    "Barrier",
    "Comparison",
    "GroupProfile",
    "Landscape",
    "MatrixComparison",
    "NormalizedAccuracy",
    "ParameterComparison",
    "Plane",
    "RankRule",
    "ScoreMap",
    "SiteDifference",
    "compare_activations",
    "compare_experts",
    "cosines",
    "distances",
    "effective_rank",
    "embed",
    "energy_share",
    "group_of",
    "grouped",
    "inner_products",
    "interpolate",
    "landscape",
    "leading_subspace",
    "linear_probe",
    "loss_and_accuracy",
    "loss_barrier",
    "normalized_accuracy",
    "norms",
    "pairwise_alignment",
    "pairwise_angles",
    "principal_angles",
    "project",
    "projected_ratio",
    "score_map",
    "sign_conflicts",
    "singular_values",
    "stable_rank",
    "subspace_alignment_ratio",
    "task_plane",
]
