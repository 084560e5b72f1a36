"""The inputs of linear layers are what their weights are multiplied by."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_merge.utilities.layer_inputs import watch_inputs


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(7)


def test_an_attention_layer_shows_what_both_its_projections_see(draw):
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    x = torch.randn(3, 5, 8, generator=draw, dtype=torch.float64)
    seen = {}
    with torch.no_grad(), watch_inputs(attention, ["in_proj_weight", "out_proj.weight"], seen.__setitem__):
        output = attention(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(seen["in_proj_weight"], x.reshape(15, 8))
    projected = seen["out_proj.weight"] @ attention.out_proj.weight.T + attention.out_proj.bias
    torch.testing.assert_close(projected, output.reshape(15, 8))


def test_a_fused_encoder_layer_shows_its_parts(draw):
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    seen = {}
    with torch.no_grad(), watch_inputs(net, list(net.state_dict()), seen.__setitem__):
        net(torch.randn(3, 5, 8, generator=draw))
    assert list(seen) == ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any(part._forward_pre_hooks for part in net.modules())
