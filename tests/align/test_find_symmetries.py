"""Permutation groups found in the graphs of modules."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_merge.align import Permutation, Symmetries, find_symmetries
from lightning_merge.align.axes import groups_of, sources
from lightning_merge.sites import Site, at_sites, split_name
from tests.align.zoo import ZOO


def randomized(module: nn.Module) -> nn.Module:
    """Parameters and statistics among which none equals another one, so that a wrong permutation shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.dim() > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if name.endswith(("weight", "var", "gamma")) else tensor.normal_(std=0.3)
    return module.eval()


@functools.cache
def found(name: str) -> tuple[nn.Module, Tensor, Symmetries]:
    module, inputs = ZOO[name][0]()
    symmetries = find_symmetries(module, inputs, verify=False)
    if inputs.is_floating_point():
        inputs = torch.randn(2, *inputs.shape[1:], generator=torch.Generator().manual_seed(2))
    return randomized(module), inputs, symmetries


@torch.no_grad()
def activations(module: nn.Module, weights: dict[str, Tensor], inputs: Tensor, sites: list[Site]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with at_sites(module, sites, lambda site, activation: seen.update({site.name: activation.clone()})):
        seen["the outputs"] = functional_call(module, weights, (inputs,), tie_weights=False)
    return seen


@pytest.mark.parametrize("name", ZOO)
def test_a_random_permutation_leaves_the_outputs_and_moves_the_activations(name):
    _, groups, within, share = ZOO[name]
    module, inputs, symmetries = found(name)
    permutation = Permutation.random(symmetries, seed=3)
    weights = module.state_dict()
    permuted = permutation.apply(weights)
    sites = [Site(path, input=is_input) for path, is_input in map(split_name, symmetries.features)]
    old, new = (activations(module, state, inputs, sites) for state in (weights, permuted))

    scale = old["the outputs"].abs().max()
    assert (new.pop("the outputs") - old["the outputs"]).abs().max() <= 1e-5 * scale
    for site, activation in new.items():
        expected = old[site]
        for dim, axis in enumerate(symmetries.features[site][1:], 1):
            expected = expected.index_select(dim, sources(axis, permutation.orders, symmetries.within))
        torch.testing.assert_close(activation, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()), msg=site)

    assert (len(symmetries.groups), len(symmetries.within)) == (groups, within)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    movable = sum(tensor.numel() for key, tensor in parameters.items() if key in symmetries.axes)
    assert movable >= share * sum(tensor.numel() for tensor in parameters.values())
    identity = Permutation.identity(symmetries).orders
    still = {group for group, order in permutation.orders.items() if torch.equal(order, identity[group])}
    for key, axes in symmetries.axes.items():
        if not still.issuperset(group for axis in axes for group in groups_of(axis)):
            assert not torch.equal(permuted[key], weights[key]), key
