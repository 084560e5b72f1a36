"""When a parameter counts as a matrix."""

from __future__ import annotations

import pytest
import torch

import lightning_merge as lm
from lightning_merge.methods import TSVM
from lightning_merge.methods.base.matrices import Matrices


@pytest.mark.parametrize(
    ("name", "shape", "view"),
    [
        ("visual.proj", (8, 5), (1, 8, 5)),
        ("token_embedding.weight", (40, 12), (1, 40, 12)),
        ("attn.in_proj_weight", (24, 8), (1, 24, 8)),
        ("model.text_projection", (8, 8), None),
        ("conv1.weight", (8, 3, 2, 2), None),
        ("ln.weight", (8,), None),
        ("logit_scale", (), None),
        ("empty", (0, 5), None),
    ],
)
def test_the_published_rule(name, shape, view):
    assert Matrices().view(name, shape) == view


def test_options():
    assert Matrices(flatten_convolutions=True).view("conv.weight", (8, 3, 2, 2)) == (1, 8, 12)
    assert Matrices(split=["*in_proj_weight"]).view("attn.in_proj_weight", (24, 8)) == (3, 8, 8)
    assert Matrices(exclude=["*embedding*"]).view("token_embedding.weight", (40, 12)) is None


def test_parts_are_merged_as_if_they_stood_alone():
    parts = [torch.randn(3, 8, 8) for _ in range(3)]
    fused = torch.cat(parts, dim=1)
    merged = lm.merge(
        {"in_proj_weight": torch.zeros(24, 8)},
        [{"in_proj_weight": expert} for expert in fused],
        TSVM(),
        matrices=Matrices(split=["in_proj_weight"]),
    ).weights["in_proj_weight"]
    alone = [lm.merge({"w": torch.zeros(8, 8)}, [{"w": e} for e in part], TSVM()).weights["w"] for part in parts]
    torch.testing.assert_close(merged, torch.cat(alone))


def test_a_flattened_kernel_is_merged_as_its_matrix():
    kernels = torch.randn(2, 8, 3, 2, 2)
    merged = lm.merge(
        {"conv.weight": torch.zeros(8, 3, 2, 2)},
        [{"conv.weight": kernel} for kernel in kernels],
        TSVM(),
        matrices=Matrices(flatten_convolutions=True),
    ).weights["conv.weight"]
    flat = lm.merge({"w": torch.zeros(8, 12)}, [{"w": k.flatten(1)} for k in kernels], TSVM()).weights["w"]
    assert torch.equal(merged.flatten(1), flat)
