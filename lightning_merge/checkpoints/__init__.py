"""Read and write weights: whatever the file, one mapping from parameter name to tensor."""

from lightning_merge.checkpoints.adapters import open_adapter
from lightning_merge.checkpoints.atomic import check_parent, put_in_place, replacing, sync, write_text
from lightning_merge.checkpoints.experts import Experts, open_expert, open_experts
from lightning_merge.checkpoints.part_file import PartFile
from lightning_merge.checkpoints.private_folder import private_folder
from lightning_merge.checkpoints.reading import STATISTICS, TORCH_SUFFIXES, Source, open_weights
from lightning_merge.checkpoints.safetensors_format import TASK_VECTOR, open_safetensors
from lightning_merge.checkpoints.statistics_files import noted_of, open_statistics, statistics_file
from lightning_merge.checkpoints.task_vector_files import open_task_vector
from lightning_merge.checkpoints.task_vector_writing import save_task_vector
from lightning_merge.checkpoints.views import match_names
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
    "Experts",
    "PartFile",
    "Source",
    "Weights",
    "check_dtypes",
    "check_output",
    "check_parent",
    "check_suffix",
    "checkpoint_of",
    "header_metadata",
    "match_names",
    "noted_of",
    "open_adapter",
    "open_expert",
    "open_experts",
    "open_safetensors",
    "open_statistics",
    "open_task_vector",
    "open_weights",
    "private_folder",
    "put_in_place",
    "replacing",
    "save_checkpoint",
    "save_task_vector",
    "save_tensors",
    "save_torch",
    "save_weights",
    "statistics_file",
    "sync",
    "write_text",
]
