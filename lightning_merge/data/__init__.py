"""Data of several domains with the same classes."""

from lightning_merge.data.digits import Digits
from lightning_merge.data.domain_data import DomainDataModule
from lightning_merge.data.domain_folders import DomainFolders

__all__ = ["Digits", "DomainDataModule", "DomainFolders"]
