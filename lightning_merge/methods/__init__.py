"""Every merging method under its paper's name, one file each."""

from lightning_merge.methods.adamerging import AdaMerging
from lightning_merge.methods.base import Context, MergeMethod
from lightning_merge.methods.base.wrapper import Wrapper
from lightning_merge.methods.breadcrumbs import Breadcrumbs
from lightning_merge.methods.cart import CART
from lightning_merge.methods.consensus_ta import ConsensusTA
from lightning_merge.methods.core_space import CoreSpace
from lightning_merge.methods.dare import DARE
from lightning_merge.methods.dc_merge import DCMerge
from lightning_merge.methods.della import DELLA
from lightning_merge.methods.doge import DOGE
from lightning_merge.methods.emr import EMR
from lightning_merge.methods.fisher import Fisher
from lightning_merge.methods.iso_c import IsoC
from lightning_merge.methods.iso_cts import IsoCTS
from lightning_merge.methods.karcher import Karcher
from lightning_merge.methods.knots import KnOTS
from lightning_merge.methods.lines import LiNeS
from lightning_merge.methods.magmax import MagMax
from lightning_merge.methods.magnitude import Magnitude
from lightning_merge.methods.mats import MaTS
from lightning_merge.methods.model_stock import ModelStock
from lightning_merge.methods.multi_slerp import MultiSLERP
from lightning_merge.methods.pcb import PCB
from lightning_merge.methods.randmix import RandMix
from lightning_merge.methods.regmean import RegMean
from lightning_merge.methods.regmean_plus_plus import RegMeanPlusPlus
from lightning_merge.methods.sce import SCE
from lightning_merge.methods.score import SCORE
from lightning_merge.methods.slerp import SLERP
from lightning_merge.methods.soup import Soup
from lightning_merge.methods.star import STAR
from lightning_merge.methods.svc import SVC
from lightning_merge.methods.tall_masks import TALLMask
from lightning_merge.methods.task_arithmetic import TaskArithmetic
from lightning_merge.methods.ties import TIES
from lightning_merge.methods.tsv_c import TSVC
from lightning_merge.methods.tsv_m import TSVM
from lightning_merge.methods.weight_average import WeightAverage
from lightning_merge.methods.wudi import WUDI

__all__ = [
    "CART",
    "DARE",
    "DELLA",
    "DOGE",
    "EMR",
    "PCB",
    "SCE",
    "SCORE",
    "SLERP",
    "STAR",
    "SVC",
    "TIES",
    "TSVC",
    "TSVM",
    "WUDI",
    "AdaMerging",
    "Breadcrumbs",
    "ConsensusTA",
    "Context",
    "CoreSpace",
    "DCMerge",
    "Fisher",
    "IsoC",
    "IsoCTS",
    "Karcher",
    "KnOTS",
    "LiNeS",
    "MaTS",
    "MagMax",
    "Magnitude",
    "MergeMethod",
    "ModelStock",
    "MultiSLERP",
    "RandMix",
    "RegMean",
    "RegMeanPlusPlus",
    "Soup",
    "TALLMask",
    "TaskArithmetic",
    "WeightAverage",
    "Wrapper",
]
