"""Callbacks for any Lightning project; import them as ``lightning_merge.callbacks``."""

from lightning_merge.callbacks.freeze_batchnorm import FreezeBatchNorm
from lightning_merge.callbacks.merge_after_fit import MergeAfterFit
from lightning_merge.callbacks.merge_at_setup import MergeAtSetup
from lightning_merge.callbacks.record_statistics import RecordStatistics

__all__ = ["FreezeBatchNorm", "MergeAfterFit", "MergeAtSetup", "RecordStatistics"]
