"""Data of several domains with the same classes, and of several tasks with classes of their own."""

from lightning_merge.data.digits import Digits
from lightning_merge.data.domain_data import DomainDataModule
from lightning_merge.data.domain_folders import DomainFolders
from lightning_merge.data.task_arrays import TaskArrays

__all__ = ["Digits", "DomainDataModule", "DomainFolders", "TaskArrays"]
