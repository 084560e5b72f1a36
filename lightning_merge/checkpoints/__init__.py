"""Read and write weights: whatever the file, one mapping from parameter name to tensor."""

from lightning_merge.checkpoints.atomic import (
    check_parent,
    exchange,
    put_in_place,
    remove,
    replacing,
    restore,
    sync,
    write_text,
)
from lightning_merge.checkpoints.part_file import PartFile, open_alone
from lightning_merge.checkpoints.reading import STATISTICS, TORCH_SUFFIXES, Source, open_weights
from lightning_merge.checkpoints.safetensors_format import TASK_VECTOR, open_safetensors
from lightning_merge.checkpoints.weights import Weights
from lightning_merge.checkpoints.writing import (
    check_dtypes,
    check_output,
    check_suffix,
    checkpoint_of,
    header_metadata,
    save_checkpoint,
    save_tensors,
    save_torch,
    save_weights,
)

__all__ = [
    "STATISTICS",
    "TASK_VECTOR",
    "TORCH_SUFFIXES",
    "PartFile",
    "Source",
    "Weights",
    "check_dtypes",
    "check_output",
    "check_parent",
    "check_suffix",
    "checkpoint_of",
    "exchange",
    "header_metadata",
    "open_alone",
    "open_safetensors",
    "open_weights",
    "put_in_place",
    "remove",
    "replacing",
    "restore",
    "save_checkpoint",
    "save_tensors",
    "save_torch",
    "save_weights",
    "sync",
    "write_text",
]
