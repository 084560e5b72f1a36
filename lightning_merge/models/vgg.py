"""A VGG of any width, with the LayerNorm over channels that TACT's experiments use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_merge.models.backbones import Preprocessing
from lightning_merge.utilities.errors import MergeError


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels at every place of a feature map ``(N, C, H, W)``."""

    def forward(self, features: Tensor) -> Tensor:
        """Normalise features ``(N, C, H, W)``; the result has the same shape."""
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)


class VGG(nn.Module):
    """Convolutions with norm and ReLU, a max pool behind every stage, global average pooling, hidden layers.

    The convolutions have no bias. This is the VGG of "The Non-Local Model Merging Problem" (arXiv 2410.12766), with
    ``stages=[[128, 128], [256, 256], [512] * 3, [1024] * 3, [1024] * 3], hidden=[4096, 4096]`` and a projection.

    Args:
        stages: For every stage the widths of its convolutions.
        hidden: Widths of the linear layers behind the pooling; the last one is the number of features.
        in_chans: Channels of the images.
        img_size: Height and width that images are resized to, in pixels; the model itself takes any.
        norm: Over the channels of every place (``layer``), or over the batch (``batch``).
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]] = ((64,), (128,), (256, 256), (512, 512), (512, 512)),
        hidden: Sequence[int] = (),
        in_chans: int = 3,
        img_size: int = 32,
        norm: Literal["layer", "batch"] = "layer",
    ) -> None:
        super().__init__()
        if not stages or not all(stages):
            raise MergeError(f"A VGG needs stages of at least one convolution each, got stages={list(stages)}.")
        if norm not in _NORMS:
            raise MergeError(f"norm must be layer or batch, got {norm!r}.")
        if img_size < 2 ** len(stages):
            raise MergeError(
                f"Images of {img_size} pixels cannot be halved {len(stages)} times; use fewer stages, or an img_size "
                f"of at least {2 ** len(stages)}."
            )
        self.preprocessing = Preprocessing((img_size, img_size), (0.5,) * in_chans, (0.5,) * in_chans, "bilinear")
        width, built = in_chans, []
        for widths in stages:
            for out in widths:
                built += [nn.Conv2d(width, out, 3, padding=1, bias=False), _NORMS[norm](out), nn.ReLU()]
                width = out
            built.append(nn.MaxPool2d(2))
        self.stages = nn.Sequential(*built)
        self.hidden = nn.Sequential()
        for out in hidden:
            self.hidden.extend([nn.Linear(width, out), nn.ReLU()])
            width = out
        self.num_features = width
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.to(memory_format=torch.channels_last)  # LayerNorm over the last axis costs no copy then

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to features ``(N, num_features)``."""
        return self.hidden(self.stages(images).mean(dim=(2, 3)))


_NORMS = {"layer": ChannelLayerNorm, "batch": nn.BatchNorm2d}
