"""Callbacks for any Lightning project; import them as ``lightning_merge.callbacks``."""

from lightning_merge.callbacks.compare_merged import CompareMerged
from lightning_merge.callbacks.freeze_batchnorm import FreezeBatchNorm
from lightning_merge.callbacks.log_alignment import LogAlignment
from lightning_merge.callbacks.merge_after_fit import MergeAfterFit
from lightning_merge.callbacks.merge_at_setup import MergeAtSetup
from lightning_merge.callbacks.merge_every_epoch import MergeEveryEpoch
from lightning_merge.callbacks.record_statistics import RecordStatistics
from lightning_merge.callbacks.save_task_vector import SaveTaskVector

__all__ = [
    "CompareMerged",
    "FreezeBatchNorm",
    "LogAlignment",
    "MergeAfterFit",
    "MergeAtSetup",
    "MergeEveryEpoch",
    "RecordStatistics",
    "SaveTaskVector",
]
