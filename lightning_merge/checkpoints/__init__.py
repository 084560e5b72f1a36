"""Read and write weights: whatever the file, one mapping from parameter name to tensor."""

from lightning_merge.checkpoints.atomic import exchange, put_in_place, replacing, sync_folder, write_text
from lightning_merge.checkpoints.part_file import PartFile, open_alone
from lightning_merge.checkpoints.reading import STATISTICS, Source, open_weights
from lightning_merge.checkpoints.weights import Weights
from lightning_merge.checkpoints.writing import (
    check_output,
    check_suffix,
    header_metadata,
    save_torch,
    save_weights,
)

__all__ = [
    "STATISTICS",
    "PartFile",
    "Source",
    "Weights",
    "check_output",
    "check_suffix",
    "exchange",
    "header_metadata",
    "open_alone",
    "open_weights",
    "put_in_place",
    "replacing",
    "save_torch",
    "save_weights",
    "sync_folder",
    "write_text",
]
