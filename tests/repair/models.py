"""Small models that the tests of repair share."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_merge.repair import Correction, find_sites
from lightning_merge.utilities.sites import Site, at_sites


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of every place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class UnitNorm(nn.Module):
    """Scale every embedding to length one."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)


class VGG(nn.Module):
    """TACT's VGG, small: convolutions without bias and LayerNorm, hidden layers, a projection of length one."""

    def __init__(
        self, widths: Sequence[int | str] = (4, "m", 6), hidden: int = 8, out: int = 5, classes: int = 3
    ) -> None:
        super().__init__()
        built: list[nn.Module] = []
        width = 1
        for item in widths:
            if item == "m":
                built.append(nn.MaxPool2d(2))
            else:
                built += [nn.Conv2d(width, item, 3, padding=1, bias=False), ChannelNorm(item, eps=1e-6), nn.ReLU()]
                width = item
        self.features = nn.Sequential(*built)
        self.hidden = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.projection = nn.Linear(hidden, out, bias=False)
        self.unit = UnitNorm()
        self.logit_scale = nn.Parameter(torch.tensor([1.0]))
        self.head = nn.Linear(out, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.hidden(self.features(images).mean((2, 3)))
        return self.logit_scale.exp() * self.head(self.unit(self.projection(x)))


def vit() -> nn.Module:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=3, in_chans=1
    )


def resnet18() -> nn.Module:
    """A ResNet-18 of few channels."""
    import timm

    block = timm.models.resnet.BasicBlock
    return timm.models.ResNet(block, (2, 2, 2, 2), num_classes=3, in_chans=1, channels=(8, 8, 16, 16))


def expert_of(module: nn.Module, seed: int, size: float = 0.3) -> dict[str, Tensor]:
    """Weights a little away from the module's; variances stay positive."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in copy.deepcopy(module.state_dict()).items():
        if not tensor.is_floating_point():
            found[name] = tensor
        elif name.endswith("running_var"):
            found[name] = tensor * (1 + torch.rand(tensor.shape, generator=draw))
        else:
            scale = tensor.std() if tensor.numel() > 1 and tensor.std() > 0 else 0.3
            found[name] = tensor + size * scale * torch.randn(tensor.shape, generator=draw)
    return found


def mean_of(*experts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: sum(expert[name] for expert in experts) / len(experts) if tensor.is_floating_point() else tensor
        for name, tensor in experts[0].items()
    }


def images(count: int = 24, size: int = 8, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, size, size, generator=draw) + 2 * torch.randn(count, 1, 1, 1, generator=draw)


def upsampled(pixels: Tensor) -> Tensor:
    """Images ``(N, 8, 8)`` of a golden file, each pixel four times: ``(N, 1, 16, 16)``."""
    return F.interpolate(pixels.float().unsqueeze(1), scale_factor=2)


def random_correction(module: nn.Module, x: torch.Tensor, sites: list[Site] | None = None) -> Correction:
    """Draw a correction of some sites of a module, by default of those that are found, which is run on images."""
    draw = torch.Generator().manual_seed(3)
    channels = {}
    sites = find_sites(module, x) if sites is None else sites
    with torch.no_grad(), at_sites(module, sites, lambda site, a: channels.update({site: a.shape[site.axis]})):
        module.eval()(x)
    scale = {site: 0.8 + 0.4 * torch.rand(channels[site], generator=draw) for site in sites}
    return Correction(scale, {site: 0.1 * torch.randn(channels[site], generator=draw) for site in sites})
