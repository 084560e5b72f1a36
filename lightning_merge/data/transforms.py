"""From an image to the tensor that a backbone expects."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_merge.models.backbones import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision.transforms import InterpolationMode


Transform = Callable[["Image"], Tensor]
"""Function from an RGB image to a tensor ``(3, H, W)``."""


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """Build the transform that timm and open_clip evaluate with: resize, crop the centre, normalise."""
    from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
    from torchvision.transforms import v2

    resized = [math.floor(side / preprocessing.crop) for side in preprocessing.size]
    interpolation = _interpolation(preprocessing)
    if preprocessing.resize == "squash":
        resize, crop = v2.Resize(resized, interpolation=interpolation), v2.CenterCrop(preprocessing.size)
    elif preprocessing.resize == "longest":
        resize = ResizeKeepRatio(resized, longest=1.0, interpolation=preprocessing.interpolation)
        crop = CenterCropOrPad(list(preprocessing.size))
    elif resized[0] == resized[1]:
        resize, crop = v2.Resize(resized[0], interpolation=interpolation), v2.CenterCrop(preprocessing.size)
    else:
        resize = ResizeKeepRatio(resized, interpolation=preprocessing.interpolation)
        crop = v2.CenterCrop(preprocessing.size)
    return v2.Compose([resize, crop, *_to_tensor(preprocessing)])


def train_transform(preprocessing: Preprocessing, crop_scale: float, flip: bool) -> Transform:
    """Build the training transform: crop at random at least ``crop_scale`` of the area, flip half, normalise."""
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


def _interpolation(preprocessing: Preprocessing) -> InterpolationMode:
    from torchvision.transforms import InterpolationMode

    return InterpolationMode(preprocessing.interpolation)
