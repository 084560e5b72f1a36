"""Small models of many kinds, whose permutation groups are found."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class Forked(nn.Module):
    """A residual branch and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.back = nn.Linear(12, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.side, self.head = nn.Linear(12, 5), nn.Linear(13, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        h = F.relu(self.stem(x))
        h = h + self.back(F.gelu(self.branch(h)))
        return self.head(torch.cat([h, torch.tanh(self.side(x))], dim=1))


class Grouped(nn.Module):
    """GroupNorm, a padded shortcut and a flattened feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.second, self.batch = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.hidden, self.head = nn.Linear(12 * 16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        x = F.max_pool2d(F.relu(self.batch(self.second(x)) + F.pad(x, (0, 0, 0, 0, 2, 2))), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


class UNet(nn.Module):
    """A transposed convolution, an upsampling, depthwise and grouped kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.depth = nn.Conv2d(3, 8, 4, stride=2, padding=1), nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.mid, self.up = nn.Conv2d(16, 12, 3, padding=1, groups=4), nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.shuffle, self.out = nn.Conv2d(16, 20, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = F.relu(self.down(x))
        high = self.up(F.silu(self.mid(self.depth(low))))
        wide = torch.cat([high, F.interpolate(low, scale_factor=2)], dim=1)
        return self.out(F.glu(F.pixel_shuffle(self.shuffle(wide), 2).repeat(1, 2, 1, 1), 1))


class GPT(nn.Module):
    """Fused queries, keys and values, split in three; learned positions."""

    def __init__(self, width: int = 16, heads: int = 2, words: int = 20, length: int = 6) -> None:
        super().__init__()
        self.heads, self.words, self.places = heads, nn.Embedding(words, width), nn.Embedding(length, width)
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 24), nn.Linear(24, width)
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).split(width, 2)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        scores = (q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5
        scores = scores.masked_fill(torch.triu(torch.ones(length, length, dtype=torch.bool), 1), float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))
        return self.head(x + self.down(F.gelu(self.up(self.norm2(x)))))


class Llama(nn.Module):
    """Four queries for two keys, rotary positions, RMSNorm, a gate; the head is tied to the embedding."""

    def __init__(self, width: int = 16, length: int = 6) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, width), nn.Linear(width, 20, bias=False)
        self.head.weight = self.words.weight
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.q, self.k, self.v = (nn.Linear(width, out, bias=False) for out in (width, width // 2, width // 2))
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up, self.down = nn.Linear(width, 24), nn.Linear(width, 24), nn.Linear(24, width)
        angles = torch.arange(length)[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale

    def turn(self, x: Tensor) -> Tensor:
        return x * self.cos + torch.cat([-x[..., 2:], x[..., :2]], -1) * self.sin

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        batch, length, width = x.shape
        h = self.norm(x)
        q, k, v = (layer(h).view(batch, length, -1, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).reshape(batch, 4, length, 4) for part in (self.turn(k), v))
        h = F.scaled_dot_product_attention(self.turn(q), k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).reshape(batch, length, width))
        h = self.norm(x)
        return self.head(self.norm(x + self.down(F.silu(self.gate(h)) * self.up(h))))


class Recurrent(nn.Module):
    """Two recurrent layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.LSTM(5, 6, num_layers=2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


class Projected(nn.Module):
    """An image tower as CLIP uses it: unit length, times a scale, against fixed texts."""

    def __init__(self, tower: nn.Module, width: int) -> None:
        super().__init__()
        self.tower, self.scale, self.texts = tower, nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.randn(5, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.exp() * F.normalize(self.tower(x), dim=-1) @ F.normalize(self.texts, dim=-1).T


def clip(kind: str) -> nn.Module:
    """An image tower of open_clip."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    if kind == "resnet":
        return Projected(ModifiedResNet([1, 1, 1, 1], output_dim=6, heads=4, image_size=32, width=8), 6)
    tower = VisionTransformer(
        image_size=16, patch_size=8, width=16, layers=2, heads=2, mlp_ratio=2, ls_init_value=0.1, output_dim=6
    )
    return Projected(tower, 6)


def of_timm(name: str, size: int = 32, **arguments: object) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (timm.create_model(name, num_classes=5, **arguments), torch.zeros(1, 3, size, size))


def images(make: Callable[[], nn.Module], size: int = 32) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (make(), torch.zeros(1, 3, size, size))


def tokens(make: Callable[[], nn.Module]) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (make(), torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0)))


VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "num_heads": 2, "depth": 2}
REGISTERS = {"reg_tokens": 3, "qk_norm": True, "global_pool": "avg"}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 4)}
CFG = [8, "M", 12, "M", 16, "M", 16, "M", 16, "M"]


def vgg(**arguments: object) -> nn.Module:
    return timm.models.vgg.VGG(CFG, num_classes=5, mlp_ratio=0.002, **arguments)


def mixer() -> nn.Module:
    return timm.models.mlp_mixer.MlpMixer(5, 32, patch_size=16, num_blocks=2, embed_dim=16)


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 24, num_classes=5)


def shufflenet() -> nn.Module:
    return torchvision.models.ShuffleNetV2([1, 1, 1], [8, 8, 16, 24, 32], num_classes=5)


def efficientnet() -> nn.Module:
    """The first block of every stage."""
    model = timm.create_model("efficientnet_b0", num_classes=5)
    model.blocks = nn.Sequential(*(stage[:1] for stage in model.blocks))
    return model


ZOO: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], int, int, float]] = {
    # a model and its input; how many groups it has, how many of them are within others, the least share that moves
    "vgg11": (images(vgg), 7, 0, 0.99),
    "vgg11_bn": (images(lambda: vgg(norm_layer=nn.BatchNorm2d)), 7, 0, 0.99),
    "resnet18": (of_timm("resnet18"), 12, 0, 0.99),
    "resnet50": (of_timm("resnet50", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)), 13, 0, 0.99),
    "resnext": (of_timm("resnext50_32x4d", layers=(1, 1, 1, 1)), 17, 4, 0.99),
    "convnext_atto": (of_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 12, 12)), 8, 0, 0.99),
    "efficientnet_b0": (images(efficientnet), 22, 0, 0.99),
    "densenet": (of_timm("densenet121", growth_rate=4, block_config=(2, 2, 2)), 15, 0, 0.99),
    "vit_tiny": (of_timm("vit_tiny_patch16_224", **VIT, init_values=1e-5), 9, 4, 0.99),
    "vit_registers": (
        of_timm("vit_tiny_patch16_224", **VIT, **REGISTERS),
        10,
        2,
        0.99,
    ),
    "eva": (of_timm("eva02_tiny_patch14_224", **{**VIT, "depth": 1}), 4, 1, 0.99),
    "swin": (of_timm("swin_tiny_patch4_window7_224", **SWIN), 14, 6, 0.95),
    "mixer": (
        images(mixer),
        5,
        0,
        0.99,
    ),
    "clip_vit": (images(lambda: clip("vit"), 16), 10, 4, 0.99),
    "clip_resnet": (images(lambda: clip("resnet")), 19, 2, 0.99),
    "torchvision_vit": (
        images(torchvision_vit, 16),
        9,
        4,
        0.99,
    ),
    "shufflenet": (
        images(shufflenet, 64),
        8,
        0,
        0.95,
    ),
    "forked": (images(Forked, 2), 3, 0, 0.99),
    "grouped": (images(Grouped, 16), 5, 1, 0.99),
    "unet": (images(UNet, 8), 6, 2, 0.99),
    "gpt": (tokens(GPT), 5, 2, 0.99),
    "llama": (tokens(Llama), 5, 2, 0.99),
    "lstm": (lambda: (Recurrent(), torch.randn(2, 3, 5)), 2, 0, 0.99),
}
