"""One picture of the features of several models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lightning_merge as lm
from lightning_merge.analysis import project


def features() -> dict[str, torch.Tensor]:
    return {"merged": torch.randn(12, 6), "expert": torch.randn(9, 6) + torch.tensor([20.0, 0, 0, 0, 0, 0])}


def test_principal_components_of_all_models_together():
    given = features()
    found = project(given, "pca")
    together = torch.cat(list(given.values())).double()
    _, _, components = torch.linalg.svd(together - together.mean(dim=0), full_matrices=False)
    expected = (together - together.mean(dim=0)) @ components[:2].T
    torch.testing.assert_close(torch.cat(list(found.values())).abs(), expected.abs().float(), rtol=1e-4, atol=1e-4)
    assert {name: len(places) for name, places in found.items()} == {"merged": 12, "expert": 9}


def test_t_sne_keeps_clusters_apart_and_is_reproducible():
    given = features()
    found, again = project(given, seed=3), project(given, seed=3)
    assert all(torch.equal(places, again[name]) for name, places in found.items())
    centres = {name: places.mean(dim=0) for name, places in found.items()}
    own = [np.linalg.norm(place - centres[name]) for name in found for place in found[name]]
    other = {"merged": "expert", "expert": "merged"}
    cross = [np.linalg.norm(place - centres[other[name]]) for name in found for place in found[name]]
    assert np.mean(np.less(own, cross)) > 0.9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": torch.randn(9, 6), "b": torch.randn(9, 5)}, "different widths"),
        ({"a": torch.randn(3, 6)}, "at least 5 samples"),
        ({}, "at least 5 samples"),
        ({"a": torch.full((9, 6), float("nan"))}, "not finite"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(given, message):
    with pytest.raises(lm.MergeError, match=message):
        project(given)
    with pytest.raises(lm.MergeError, match="tsne or pca"):
        project(features(), "umap")
