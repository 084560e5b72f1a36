"""Activation matching of small modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from lightning_merge.align import (
    Permutation,
    find_symmetries,
    groups_without_features,
    match_activations,
    match_weights,
)
from lightning_merge.align import activation_matching as implementation
from lightning_merge.utilities.errors import MergeError
from tests.align.models import same, same_orders
from tests.utilities.test_processes import on_processes


class Net(nn.Module):
    """A residual branch, a normalization, an in-place activation and a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.branch, self.back = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(6 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = x + self.back(self.act(self.branch(x)))
        return self.head(x.flatten(1))


MODULES = {
    "net": Net,
    "attention": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=4, patch_size=2, embed_dim=12, depth=1, num_heads=3, num_classes=4
    ),
    "two groups in one activation": lambda: MlpMixer(
        num_classes=4, img_size=4, patch_size=2, num_blocks=1, embed_dim=12
    ),
}


def images(seed: int = 0, count: int = 40) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def make(name: str = "net"):
    torch.manual_seed(0)
    module = MODULES[name]()
    state = {k: t + 0.1 * torch.rand_like(t) if t.is_floating_point() else t for k, t in module.state_dict().items()}
    symmetries = find_symmetries(module, (images(count=2),))
    return module, state, symmetries


def other_model():
    torch.manual_seed(5)
    return {k: t + 0.1 * torch.rand_like(t) if t.is_floating_point() else t for k, t in Net().state_dict().items()}


@pytest.mark.parametrize("name", MODULES)
def test_planted_permutations_are_recovered(name):
    module, state, symmetries = make(name)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    planted = Permutation.random(symmetries, 3).apply(state)
    assert not same(planted, state)
    found = match_activations(module, state, planted, symmetries, [images()], rest="identity")
    assert same(found.apply(planted), state)
    assert same(module.state_dict(), before)
    assert module.training


def test_batches_and_labels_change_nothing(monkeypatch):
    module, state, symmetries = make()
    other, data = other_model(), images()
    whole = match_activations(module, state, other, symmetries, [data])
    monkeypatch.setattr(implementation, "AT_ONCE", 7)
    split = match_activations(
        module, state, other, symmetries, [(part, torch.zeros(len(part))) for part in data.split(9)]
    )
    assert same_orders(whole, split)
    assert whole.moved() > 0


def test_two_processes_find_what_one_finds():
    module, state, symmetries = make()
    other, data = other_model(), images()
    alone = match_activations(module, state, other, symmetries, [data])
    half = match_activations(module, state, other, symmetries, [data[:5]])
    assert not same_orders(alone, half)

    def work(rank: int) -> bool:
        parts = ([data[:5]], [data[5:20], data[20:]])[rank]
        return same_orders(match_activations(module, state, other, symmetries, parts, distributed=True), alone)

    def fail(rank: int) -> None:
        match_activations(module, state, other, symmetries, [data, "text"][rank : rank + 1], distributed=True)

    assert on_processes(2, work) == ([True, True], [None, None])
    _, errors = on_processes(2, fail)
    assert all("holds a str; it must be images" in error for error in errors)


def test_groups_that_no_activation_carries_are_matched_by_weights_or_stay():
    module, state, symmetries = make()
    blind = replace(symmetries, features={k: v for k, v in symmetries.features.items() if k.startswith("branch")})
    missing = groups_without_features(blind)
    assert groups_without_features(symmetries) == []
    assert 0 < len(missing) < len(symmetries.groups)
    planted = Permutation.random(symmetries, 3).apply(state)
    by_weights = match_activations(module, state, planted, blind, [images()])
    assert same(by_weights.apply(planted), state)
    staying = match_activations(module, state, planted, blind, [images()], rest="identity")
    assert all(torch.equal(staying.orders[name], blind.identity_order(name)) for name in missing)
    nothing = match_activations(module, state, planted, replace(symmetries, features={}), [])
    assert same_orders(nothing, match_weights(state, planted, symmetries, restarts=1))


def test_dead_units_and_constant_images_are_no_problem():
    module, state, symmetries = make()
    dead = {**state, "branch.weight": state["branch.weight"] * 0, "branch.bias": state["branch.bias"] * 0}
    for data in (images(), torch.ones(4, 3, 4, 4)):
        found = match_activations(module, state, dead, symmetries, [data])
        for order in found.orders.values():
            assert torch.equal(order.sort().values, torch.arange(len(order)))


def test_refusals():
    module, state, symmetries = make()

    def refusal(batches=None, other=state, **given):
        with pytest.raises(MergeError) as caught:
            match_activations(module, state, other, symmetries, [images()] if batches is None else batches, **given)
        return str(caught.value)

    assert "hold no batch; give at least one" in refusal([])
    assert "hold one sample; correlations need two at least" in refusal([images(count=1)])
    assert "holds a dict; it must be images or (images, labels)" in refusal([{"image": images()}])
    assert "rest='nothing' must be 'weights' or 'identity'" in refusal(rest="nothing")
    assert "is not finite on the data of the alignment" in refusal([images() / 0])
    assert "'head.bias' of the module is missing in the other model" in refusal(
        other={name: tensor for name, tensor in state.items() if name != "head.bias"}
    )
    assert "there is none; call" in refusal(distributed=True)
    mixer, mixed, groups = make("two groups in one activation")
    with pytest.raises(MergeError, match="can be read only once"):
        match_activations(mixer, mixed, mixed, groups, iter([images()]))
    small = torch.randn(4, 3, 6, 6)
    net, weights, found = make()
    with pytest.raises(RuntimeError):  # the module's own
        match_activations(net, weights, weights, found, [small])
    assert net.training
