"""From an image to the tensor that a backbone expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    from lightning_merge.models.backbones import Preprocessing

Transform = Callable[["Image"], Tensor]


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """Resize the shorter side, crop the centre, normalise."""
    from torchvision.transforms import v2

    height, width = preprocessing.size
    resized = round(height / preprocessing.crop), round(width / preprocessing.crop)
    return v2.Compose(
        [
            v2.Resize(min(resized) if height == width else resized, interpolation=_interpolation(preprocessing)),
            v2.CenterCrop((height, width)),
            *_to_tensor(preprocessing),
        ]
    )


def train_transform(preprocessing: Preprocessing, crop_scale: float, flip: bool) -> Transform:
    """Crop at random at least ``crop_scale`` of the area, flip half of the images, normalise."""
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(
                preprocessing.size, scale=(crop_scale, 1.0), interpolation=_interpolation(preprocessing)
            ),
            v2.RandomHorizontalFlip(0.5 if flip else 0.0),
            *_to_tensor(preprocessing),
        ]
    )


def _to_tensor(preprocessing: Preprocessing) -> list[Callable]:
    import torch
    from torchvision.transforms import v2

    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(preprocessing.mean, preprocessing.std),
        v2.ToPureTensor(),
    ]


def _interpolation(preprocessing: Preprocessing):
    from torchvision.transforms import InterpolationMode

    return InterpolationMode(preprocessing.interpolation)
