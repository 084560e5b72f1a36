"""Read and write weights: whatever the file, one mapping from parameter name to tensor."""

from lightning_merge.checkpoints.reading import STATISTICS, Source, Weights, open_weights
from lightning_merge.checkpoints.writing import check_output, check_suffix, replacing, save_weights, write_text

__all__ = [
    "STATISTICS",
    "Source",
    "Weights",
    "check_output",
    "check_suffix",
    "open_weights",
    "replacing",
    "save_weights",
    "write_text",
]
