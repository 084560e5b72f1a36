"""The sites that are found in small versions of known families, and in a user's own module."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from lightning_merge.repair import find_head, find_sites
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.sites import Site
from tests.repair.models import VGG, images, resnet18, vit


def names(module: nn.Module, x: torch.Tensor) -> list[str]:
    return [site.name for site in find_sites(module, x)]


def of_blocks(template: str, blocks: int, parts: str) -> list[str]:
    """``block``: the block itself; other parts are behind a dot."""
    return [
        template.format(i) if part == "block" else f"{template.format(i)}.{part}"
        for i in range(blocks)
        for part in parts.split()
    ]


def test_vgg_with_layer_norm_has_the_sites_of_the_paper():
    sites = find_sites(VGG((4, "m", 6, 6)), images(2))
    # behind every LayerNorm, behind the hidden layers, behind the projection of length one; nothing behind the head
    expected = "features.1 features.5 features.8 hidden.0 hidden.2 unit"
    assert [site.name for site in sites] == expected.split()
    assert [site.axis for site in sites] == [1, 1, 1, -1, -1, -1]


def test_vit_has_the_sites_of_the_paper():
    sites = find_sites(vit(), images(2))
    blocks = of_blocks("blocks.{}", 2, "attn.proj:input norm2 mlp.fc1 block")
    assert [site.name for site in sites] == ["blocks.0:input", *blocks]
    assert {site.axis for site in sites} == {-1}
    assert len(blocks) == 4 * 2


def test_resnets_have_every_norm_and_every_block():
    sites = find_sites(resnet18(), images(2, 32))
    found = [site.name for site in sites]
    assert found[:4] == ["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer1.0.downsample.1"]
    assert found[4:8] == ["layer1.0", "layer1.1.bn1", "layer1.1.bn2", "layer1.1"]
    assert len(found) == 1 + 8 * 3 + 4  # four blocks bring the input to other channels
    assert {site.axis for site in sites} == {1}
    found = names(
        timm.models.ResNet(timm.models.resnet.Bottleneck, (1, 1, 1, 1), num_classes=3), torch.randn(2, 3, 32, 32)
    )
    assert found[:6] == ["bn1", *of_blocks("layer1.{}", 1, "bn1 bn2 bn3 downsample.1 block")]


def test_vgg_with_batch_norm():
    model = timm.models.vgg.VGG([4, "M", 6, "M"], num_classes=3, norm_layer=nn.BatchNorm2d)
    assert names(model, torch.randn(2, 3, 32, 32)) == ["features.1", "features.5", "pre_logits.fc1", "pre_logits.fc2"]
    assert find_head(model, torch.randn(2, 3, 32, 32)) == "head.fc"


@pytest.mark.parametrize("conv_mlp", [False, True], ids=["channels last", "channels first"])
def test_convnext_channels_are_told_from_places(conv_mlp):
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=3, conv_mlp=conv_mlp)
    sites = find_sites(model, torch.randn(2, 3, 64, 64))
    found = {site.name: site.axis for site in sites}
    inside = 1 if conv_mlp else -1
    assert list(found)[:4] == ["stem.1", *of_blocks("stages.0.blocks.{}", 1, "norm mlp.fc1 block")]
    assert list(found)[4:6] == ["stages.1.downsample.0", "stages.1.downsample.1"]
    assert [found[name] for name in list(found)[:4]] == [1, inside, inside, 1]
    assert not any(name.startswith("head") or name.endswith(("fc2", "conv_dw")) for name in found)


def test_swin_has_its_channels_last():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=8,
        depths=(2, 1),
        num_heads=(2, 2),
        num_classes=3,
    )
    sites = find_sites(model, torch.randn(2, 3, 32, 32))
    parts = "attn.proj:input norm2 mlp.fc1 block"
    assert [site.name for site in sites] == [
        "patch_embed.norm",
        *of_blocks("layers.0.blocks.{}", 2, parts),
        "layers.1.downsample.norm",
        "layers.1.downsample.reduction",
        *of_blocks("layers.1.blocks.{}", 1, parts),
    ]
    assert {site.axis for site in sites} == {-1}


def test_mixer():
    model = timm.models.mlp_mixer.MlpMixer(img_size=64, patch_size=32, embed_dim=8, num_blocks=1, num_classes=3)
    sites = {site.name: site.axis for site in find_sites(model, torch.randn(2, 3, 64, 64))}
    block = of_blocks("blocks.{}", 1, "norm1 mlp_tokens.fc1 norm2 mlp_channels.fc1 block")
    assert sites == {"stem.proj": 1, **dict.fromkeys(block, -1)}


def test_a_norm_with_its_activation_within_is_corrected_between_them():
    model = timm.create_model("efficientnet_lite0", num_classes=3)
    found = names(model, torch.randn(2, 3, 32, 32))
    assert found[:3] == ["bn1.drop:input", "blocks.0.0.bn1.drop:input", "blocks.0.0.bn2.drop:input"]
    assert "blocks.1.1" in found


@pytest.mark.parametrize("norm_first", [True, False])
def test_pytorch_s_encoder_hides_its_context_so_that_the_output_of_attention_stands_in(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 2))
    parts = "self_attn norm2 linear1 block" if norm_first else "self_attn norm1 linear1 norm2"
    assert names(model, torch.randn(2, 5, 3)) == ["0", *of_blocks("1.layers.{}", 2, parts)]
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in model.modules())


class Own(nn.Module):
    """A residual branch, in-place activations and a concatenation, all in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.side = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 2, 1),
        )
        self.norm, self.relu, self.head = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Linear(6, 3)

    def forward(self, x):
        x = self.relu(self.norm(self.first(x)))
        y = x + self.relu(self.branch(x))
        return self.head(torch.cat([y, self.side(y).relu_()], dim=1).mean((2, 3)))


def test_a_user_s_own_module():
    assert names(Own(), images(2)) == ["norm", "branch", "side"]
    assert find_head(Own(), images(2)) == "head"


def test_sites_can_be_named():
    sites = find_sites(vit(), images(2), ["blocks.*.mlp.fc1", "blocks.0.attn.proj:input", Site("norm", -1)])
    assert [site.name for site in sites] == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "blocks.0.attn.proj:input", "norm"]
    with pytest.raises(MergeError, match=r"sites: the model has no part 'blocks\.9'"):
        find_sites(vit(), images(2), ["blocks.9"])
    with pytest.raises(MergeError, match="at least one site"):
        find_sites(vit(), images(2), [])
    with pytest.raises(MergeError, match=r"which axis holds the channels of 'features\.3'"):
        find_sites(VGG((4, "m")), images(2), ["features.3"])


def test_a_module_that_cannot_be_run_is_said_to_be():
    with pytest.raises(MergeError, match=r"cannot be run on images \(2, 3, 8, 8\)"):
        find_sites(VGG(), torch.randn(2, 3, 8, 8))
    with pytest.raises(MergeError, match="ends in 0 linear layers"):
        find_head(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))
