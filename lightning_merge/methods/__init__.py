"""Every merging method under its paper's name, one file each."""

from lightning_merge.methods.base import Context, MergeMethod
from lightning_merge.methods.iso_c import IsoC
from lightning_merge.methods.iso_cts import IsoCTS
from lightning_merge.methods.magmax import MagMax
from lightning_merge.methods.score import SCORE
from lightning_merge.methods.task_arithmetic import TaskArithmetic
from lightning_merge.methods.ties import TIES
from lightning_merge.methods.tsv_m import TSVM
from lightning_merge.methods.weight_average import WeightAverage
from lightning_merge.methods.wrapper import Wrapper

__all__ = [
    "SCORE",
    "TIES",
    "TSVM",
    "Context",
    "IsoC",
    "IsoCTS",
    "MagMax",
    "MergeMethod",
    "TaskArithmetic",
    "WeightAverage",
    "Wrapper",
]
