"""Plots: one function a figure, from the very records that the tables are made of."""

from lightning_merge.report.plots.activations import (
    plot_embeddings,
    plot_landscape,
    plot_landscapes,
    plot_variance_ratio,
)
from lightning_merge.report.plots.layers import plot_layers, plot_updates
from lightning_merge.report.plots.matrices import choose_matrices, plot_alignment, plot_score_maps, plot_spectra
from lightning_merge.report.plots.scores import best_rows, plot_domains, plot_heat_map, plot_sweep, plot_tasks

__all__ = [
    "best_rows",
    "choose_matrices",
    "plot_alignment",
    "plot_domains",
    "plot_embeddings",
    "plot_heat_map",
    "plot_landscape",
    "plot_landscapes",
    "plot_layers",
    "plot_score_maps",
    "plot_spectra",
    "plot_sweep",
    "plot_tasks",
    "plot_updates",
    "plot_variance_ratio",
]
