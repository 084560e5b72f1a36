"""The manifest: how a merge came to be."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from lightning_merge import __version__
from lightning_merge.checkpoints import Weights
from lightning_merge.methods import MergeMethod


def make_manifest(
    method: MergeMethod,
    settings: Mapping[str, Any],
    base: Weights,
    experts: Mapping[str, Weights],
    statistics: Mapping[str, Weights],
) -> dict[str, Any]:
    """Record how a merge came to be: plain values only, so that it can be stored anywhere.

    Args:
        method: The method.
        settings: The options that the weights depend on, as plain values.
        base: The base.
        experts: The experts by name.
        statistics: The statistics of the experts' data, by expert; none where the method needs none.
    """
    return {
        "method": method.describe(),
        **settings,
        "base": base.provenance(),
        "experts": {name: weights.provenance() for name, weights in experts.items()},
        "statistics": {name: weights.provenance() for name, weights in statistics.items()},
        "versions": {
            "lightning_merge": __version__,
            "torch": str(torch.__version__),
            "python": ".".join(map(str, sys.version_info[:3])),
        },
    }
