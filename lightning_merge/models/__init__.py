"""Experts: a pretrained backbone, a head, and the recipe that fine-tunes them."""

from lightning_merge.models.expert import Expert

__all__ = ["Expert"]
