"""The file of a task, and its images as a data set."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_merge.utilities.errors import MergeError, raise_all

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's "L"

Part = tuple[Any, np.ndarray]
"""Images, as an array or a tensor, and their labels."""

_INFLATION, _SMALL = 50, 1 << 28  # a file's arrays may have so many times its bytes, or 256 MiB
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "classes")


@dataclass(frozen=True)
class Task:
    """The content of a task's file.

    Args:
        classes: The names of the classes, in the order of the labels.
        train: Images and labels to train and validate on.
        test: Images and labels to test on.
    """

    classes: list[str]
    train: Part
    test: Part


def read_task(path: Path) -> Task:
    """Read a task's file and check what it holds.

    Raises:
        MergeError: If it cannot be read, lacks an array, or if arrays do not fit each other.
    """
    try:
        _check_size(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asanyarray(file[name]) for name in _ARRAYS if name in file}
    except Exception as error:  # numpy, zipfile and zlib raise anything at damaged files
        raise MergeError(f"The task file {path} cannot be read ({error}); write it with numpy.savez.") from error
    missing = [name for name in _ARRAYS if name not in arrays]
    raise_all([f"{path} lacks the array {name!r}; it needs {', '.join(_ARRAYS)}." for name in missing])
    classes = [str(name) for name in arrays["classes"].tolist()]
    train, test = ((arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in ("train", "test"))
    raise_all(
        [
            *_part_problems(path, "train", *train, classes=len(classes)),
            *_part_problems(path, "test", *test, classes=len(classes)),
        ]
    )
    return Task(classes, (train[0], train[1].astype(np.int64)), (test[0], test[1].astype(np.int64)))


def _check_size(path: Path) -> None:
    """Raise a ValueError if the arrays would be far larger than their file, before any of them is read."""
    with zipfile.ZipFile(path) as archive:
        size = sum(info.file_size for info in archive.infolist() if info.filename.removesuffix(".npy") in _ARRAYS)
    if size > max(_SMALL, _INFLATION * path.stat().st_size):
        raise ValueError(f"its arrays would have {size:,} bytes, more than {_INFLATION} times those of the file")


def _part_problems(path: Path, split: str, images: np.ndarray, labels: np.ndarray, classes: int) -> list[str]:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        return [
            f"{split}_images of {path} are {images.dtype} of shape {images.shape}; they should be uint8, (N, H, W) or "
            "(N, H, W, C) with 1 or 3 channels."
        ]
    if labels.ndim != 1 or labels.dtype.kind not in "ui" or len(labels) != len(images):
        return [
            f"{split}_labels of {path} are {labels.dtype} of shape {labels.shape}; they should be {len(images)} "
            "integers, one for each image."
        ]
    if images.size == 0:
        return [f"The {split} split of {path} is empty; every task needs training and test images."]
    outside = labels[(labels < 0) | (labels >= classes)].tolist()
    return [f"{split}_labels of {path} hold {outside[0]}, but it names {classes} classes."] if outside else []


def draw_by_class(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw ``count`` of the labels ``(N,)`` so that classes keep their share; return sorted indices ``(count,)``."""
    order = np.random.default_rng(seed).permutation(len(labels))
    places = np.empty(len(labels))  # how far down its class every sample stands, in (0, 1)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        places[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(order[np.argsort(places[order], kind="stable")[:count]])


def resized(images: np.ndarray, size: int, channels: int) -> Tensor:
    """Resize ``(N, H, W)`` or ``(N, H, W, C)`` to uint8 ``(N, channels, size, size)``, bilinear with antialiasing."""
    pixels = torch.as_tensor(images)
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels.movedim(3, 1)
    if pixels.shape[1] == 3 and channels == 1:
        pixels = (pixels.float() * torch.tensor(_GREY)[:, None, None]).sum(dim=1, keepdim=True).round().byte()
    if pixels.shape[2:] != (size, size):
        pixels = F.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True).round().byte()
    return pixels.expand(-1, channels, -1, -1).contiguous()


class ShiftedImages(Dataset):
    """Images that are shifted at random, and flipped; the border is repeated into the gap.

    Args:
        images: ``(N, C, H, W)``.
        labels: ``(N,)``.
        shift: How far at most, in pixels each way.
        flip: Whether half of them are flipped left to right.
    """

    def __init__(self, images: Tensor, labels: Tensor, shift: int, flip: bool) -> None:
        self.size = images.shape[-2:]
        self.images = F.pad(images, (shift,) * 4, mode="replicate") if shift else images
        self.labels = labels
        self.shift, self.flip = shift, flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(2 * self.shift + 1, (2,)).tolist() if self.shift else (0, 0)
        height, width = self.size
        image = self.images[index, :, top : top + height, left : left + width]
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image, self.labels[index]
