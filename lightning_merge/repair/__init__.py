"""Repair of merged models: what data say about activations, and corrections of them (REPAIR, TACT)."""

from lightning_merge.repair.batch_norm import reestimate_batch_norm
from lightning_merge.repair.corrections import Correction, insert, load_corrections, save_corrections
from lightning_merge.repair.find_sites import find_head, find_sites
from lightning_merge.repair.folding import corrected_weights, fold
from lightning_merge.repair.linear_probe import probe_head
from lightning_merge.repair.moments import Moments
from lightning_merge.repair.repair import repair
from lightning_merge.repair.tact import tact

__all__ = [
    "Correction",
    "Moments",
    "corrected_weights",
    "find_head",
    "find_sites",
    "fold",
    "insert",
    "load_corrections",
    "probe_head",
    "reestimate_batch_norm",
    "repair",
    "save_corrections",
    "tact",
]
