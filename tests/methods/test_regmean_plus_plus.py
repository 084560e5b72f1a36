"""RegMean++ against a statement of a few lines, and against RegMean where both are the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_merge as lm
from lightning_merge.methods.regmean import RegMean
from lightning_merge.methods.regmean_plus_plus import RegMeanPlusPlus, layer_of

TASKS = ("photo", "art", "sketch")


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(7)


def experts_of(module, draw, size=0.3):
    base = module.state_dict()
    return base, {
        t: {k: v + size * torch.randn(v.shape, generator=draw, dtype=v.dtype) for k, v in base.items()} for t in TASKS
    }


def images_of(draw, *shape):
    return {
        t: [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2)] for t in TASKS
    }  # fmt: skip


def solve(weights, inputs, factor):
    """(Σ G)^-1 Σ G Wᵀ, transposed."""
    grams = [x.T @ x / len(x) for x in inputs]
    grams = [factor * g + (1 - factor) * torch.diag(g.diagonal()) for g in grams]
    right = sum(g @ w.T for g, w in zip(grams, weights, strict=True))
    return torch.linalg.solve(sum(grams), right).T


def test_two_layers_by_hand(draw):
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    base, experts = experts_of(net, draw)
    images = images_of(draw, 20, 4)
    found = lm.merge(base, experts, RegMeanPlusPlus(0.8), module=net, data=images).weights

    x = [torch.cat(images[t]) for t in TASKS]
    first = solve([experts[t]["0.weight"] for t in TASKS], x, 0.8)
    bias = sum(experts[t]["0.bias"] for t in TASKS) / 3
    seen = [torch.tanh(inputs @ first.T + bias) for inputs in x]  # by the second layer, in the merged model
    second = solve([experts[t]["2.weight"] for t in TASKS], seen, 0.8)
    torch.testing.assert_close(found["0.weight"], first, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found["0.bias"], bias)
    torch.testing.assert_close(found["2.weight"], second, rtol=1e-9, atol=1e-10)


def test_within_a_block_the_expert_sees_its_own_layers(draw):
    """As in the authors' code: only the inputs of a block come from the merged model."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(3, 5, bias=False), nn.Linear(5, 3, bias=False)

        def forward(self, x):
            return x + self.down(torch.tanh(self.up(x)))

    net = nn.Sequential(Block(), Block()).double()
    base, experts = experts_of(net, draw)
    images = images_of(draw, 30, 3)
    found = lm.merge(base, experts, RegMeanPlusPlus(), module=net, data=images).weights

    x = [torch.cat(images[t]) for t in TASKS]
    for block in "01":
        ups, downs = ([experts[t][f"{block}.{part}.weight"] for t in TASKS] for part in ("up", "down"))
        up = solve(ups, x, 0.9)
        down = solve(downs, [torch.tanh(inputs @ own.T) for inputs, own in zip(x, ups, strict=True)], 0.9)
        torch.testing.assert_close(found[f"{block}.up.weight"], up, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(found[f"{block}.down.weight"], down, rtol=1e-8, atol=1e-9)
        x = [inputs + torch.tanh(inputs @ up.T) @ down.T for inputs in x]


@pytest.mark.parametrize("kernel", [False, True])
def test_one_layer_is_regmean(draw, kernel):
    net = (nn.Sequential(nn.Conv2d(2, 5, 3, stride=2, padding=1)) if kernel else nn.Linear(4, 5)).double()
    weight = "0.weight" if kernel else "weight"
    base, experts = experts_of(net, draw)
    images = images_of(draw, 6, 2, 5, 5) if kernel else images_of(draw, 20, 4)
    statistics = {}
    for t in TASKS:
        x = torch.cat(images[t])
        if kernel:  # every patch that the kernel is laid on, cut out by hand
            padded = nn.functional.pad(x, (1, 1, 1, 1))
            x = torch.cat([padded[:, :, i : i + 3, j : j + 3].flatten(1) for i in (0, 2, 4) for j in (0, 2, 4)])
        statistics[t] = {f"gram.{weight}": x.T @ x / len(x)}
    expected = lm.merge(base, experts, RegMean(), statistics=statistics).weights
    found = lm.merge(base, experts, RegMeanPlusPlus(), module=net, data=images).weights
    for name in base:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10)


def test_no_more_images_than_asked_for(draw):
    net = nn.Linear(4, 5).double()
    base, experts = experts_of(net, draw)
    images = images_of(draw, 20, 4)
    few = lm.merge(base, experts, RegMeanPlusPlus(num_examples=7), module=net, data=images).weights
    first = lm.merge(base, experts, RegMeanPlusPlus(), module=net, data={t: b[:1] for t, b in images.items()}).weights
    every = lm.merge(base, experts, RegMeanPlusPlus(num_examples=21), module=net, data=images).weights
    assert torch.equal(few["weight"], first["weight"])
    assert (few["weight"] - every["weight"]).abs().max() > 1e-3


def test_heads_of_the_experts_stay_out(draw):
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    base, experts = experts_of(net, draw)
    merged = lm.merge(base, experts, RegMeanPlusPlus(), module=net, data=images_of(draw, 9, 4), exclude=["1.*"])
    assert torch.equal(merged.weights["1.weight"], base["1.weight"])
    assert torch.equal(merged.for_task("art")["1.weight"], experts["art"]["1.weight"])


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("backbone.blocks.3.mlp.fc1.weight", "backbone.blocks.3"),
        ("visual.transformer.resblocks.11.attn.in_proj_weight", "visual.transformer.resblocks.11"),
        ("stages.0.blocks.1.mlp.fc1.weight", "stages.0.blocks.1"),
        ("patch_embed.proj.bias", "patch_embed.proj"),
        ("0.weight", "0"),
        ("weight", ""),
    ],
)
def test_layers_by_name(name, layer):
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduce_off_diagonal": 2}, r"reduce_off_diagonal must lie in \[0, 1\]"),
        ({"num_examples": 0}, r"num_examples must lie in \[1, inf\]"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"RegMeanPlusPlus: {message}"):
        RegMeanPlusPlus(**arguments)
