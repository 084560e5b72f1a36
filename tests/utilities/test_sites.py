"""Activations are watched and changed where a site says, against a plain forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.sites import Site, at_sites, split_name


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()


X = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def test_outputs_and_inputs_are_those_of_a_forward_pass():
    module, seen = net(), {}
    with at_sites(module, [Site("0"), Site("3", -1, input=True)], lambda site, x: seen.update({site.name: x.clone()})):
        after = module(X)
    assert torch.equal(after, module(X))
    assert list(seen) == ["0", "3:input"]
    assert torch.equal(seen["0"], module[0](X))
    assert torch.equal(seen["3:input"], module[:3](X))


@pytest.mark.parametrize("site", [Site("0"), Site("1", input=True)])
def test_what_is_returned_takes_the_activations_place(site):
    module = net()
    with at_sites(module, [site], lambda _, x: 2 * x):
        changed = module(X)
    assert torch.equal(changed, module[1:](2 * module[0](X)))
    assert not torch.equal(changed, module(X))


def test_the_module_is_as_before_also_after_an_error():
    module = net()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), at_sites(module, [Site("0")], lambda *_: None):
        raise KeyError
    assert not module[0]._forward_hooks
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


def test_parts_of_a_fused_encoder_layer_are_seen():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x, seen = torch.randn(2, 3, 8), []
    with torch.no_grad(), at_sites(layer, [Site("linear1", -1)], lambda _, activation: seen.append(activation)):
        layer(x)
    assert [tuple(activation.shape) for activation in seen] == [(2, 3, 16)]


def test_a_part_that_gives_several_outputs():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with at_sites(attention, [Site("", -1)], lambda _, activation: activation + 1):
        changed, weights = attention(x, x, x)
    expected = attention(x, x, x)
    torch.testing.assert_close(changed, expected[0] + 1)
    torch.testing.assert_close(weights, expected[1])


def test_an_unknown_part_is_named():
    with pytest.raises(MergeError, match="no part 'head' to watch"), at_sites(net(), [Site("head")], lambda *_: None):
        pass


@pytest.mark.parametrize(("axis", "shape"), [(1, (2, 3, 4, 5)), (-1, (2, 4, 5, 3)), (2, (2, 4, 3))])
def test_channels(axis, shape):
    activation = torch.randn(shape)
    site, values = Site("part", axis), torch.tensor([1.0, 10.0, 100.0])
    flat = site.channels_last(activation)
    assert flat.shape == (activation.numel() // 3, 3)
    assert torch.equal(flat[:, 1].sort().values, activation.select(axis, 1).flatten().sort().values)
    scaled = activation * site.along(values, activation)
    assert torch.equal(scaled.select(axis, 2), 100 * activation.select(axis, 2))


def test_names():
    assert split_name(Site("a.b", input=True).name) == ("a.b", True)
    assert split_name(Site("a.b").name) == ("a.b", False)
