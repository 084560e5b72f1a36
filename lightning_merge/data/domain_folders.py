"""Images in the layout that the field uses: ``root/domain/class/image``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from lightning_merge.data.domain_data import DomainDataModule
from lightning_merge.data.transforms import eval_transform, train_transform
from lightning_merge.models.backbones import Preprocessing
from lightning_merge.utilities.errors import MergeError, problems_of, raise_all

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")

if TYPE_CHECKING:
    from PIL import Image


class DomainFolders(DomainDataModule):
    """Images in a folder per domain, in it one per class: PACS, VLCS, OfficeHome, TerraIncognita, DomainNet, NICO++.

    Images get the preprocessing of the model's backbone. In training, a random crop of nearly the whole image and a
    horizontal flip are added.

    Args:
        root: The folder that holds the domains' folders.
        train_domains: The domains to train and validate on; by default all but the held-out one.
        test_domains: The domains to test on; by default the held-out one, else the training domains.
        held_out: The domain that is left out of training.
        classes: Use these classes only; by default all, which must be the same in every domain.
        test_on: Test on a domain's ``test`` split, on ``all`` of it (for a domain that was not trained on), or on its
            ``val`` split (to choose hyper-parameters).
        test_fraction: Share of every class that is for testing.
        val_fraction: Share of every class that is for validation.
        split_seed: Seed of the split.
        batch_size: Images of a batch, over all processes.
        num_workers: Processes that read images.
        crop_scale: The smallest share of the area that a random crop keeps in training, in (0, 1]; 1 for no crop.
        flip: Flip half of the images in training.
        size: Height and width in pixels; by default the backbone's.
        mean: Mean per channel; by default the backbone's.
        std: Standard deviation per channel; by default the backbone's.
        check_images: Open every image before starting, so that an unreadable one is found first and not halfway.
    """

    def __init__(
        self,
        root: str,
        train_domains: Sequence[str] | None = None,
        test_domains: Sequence[str] | None = None,
        held_out: str | None = None,
        classes: Sequence[str] | None = None,
        test_on: Literal["test", "all", "val"] = "test",
        test_fraction: float = 0.2,
        val_fraction: float = 0.1,
        split_seed: int = 17,
        batch_size: int = 128,
        num_workers: int = 0,
        crop_scale: float = 0.9,
        flip: bool = True,
        size: tuple[int, int] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        check_images: bool = True,
    ) -> None:
        super().__init__(
            train_domains,
            test_domains,
            held_out,
            test_on,
            test_fraction,
            val_fraction,
            split_seed,
            batch_size,
            num_workers,
        )
        self.root = Path(root).expanduser()
        self.classes = classes
        self.crop_scale = crop_scale
        self.flip = flip
        self.size, self.mean, self.std = size, mean, std
        self.check_images = check_images
        self._checked: set[str] = set()  # shared by the copies that `only` makes

    @cached_property
    def _files(self) -> dict[str, dict[str, list[Path]]]:
        """The images of every class of every domain."""
        return find_images(self.root, self.classes)

    @property
    def domains(self) -> list[str]:
        """The names of the domains' folders, sorted."""
        return list(self._files)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes' folders, sorted."""
        return list(next(iter(self._files.values())))

    def labels(self, domain: str) -> np.ndarray:
        """Return the labels ``(N,)`` of a domain's images, sorted by class and by name."""
        return np.repeat(np.arange(len(self.class_names)), [len(files) for files in self._files[domain].values()])

    def dataset(self, domain: str, indices: np.ndarray, augment: bool) -> Dataset:
        """Return the images of a domain at ``indices`` ``(n,)``: ``(3, H, W)`` each."""
        files = [file for files in self._files[domain].values() for file in files]
        labels = self.labels(domain)
        preprocessing = self.preprocessing
        transform = (
            train_transform(preprocessing, self.crop_scale, self.flip) if augment else eval_transform(preprocessing)
        )
        return ImageFiles([files[i] for i in indices], labels[indices], transform)

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of the backbone, with what was set here instead."""
        module = self.model or (self.trainer.lightning_module if self.trainer is not None else None)
        default: Preprocessing | None = getattr(module, "preprocessing", None)
        if default is None:
            if self.size is None or self.mean is None or self.std is None:
                raise MergeError(
                    "The model does not say how its images are prepared; set data.size, data.mean and data.std."
                )
            default = Preprocessing(self.size, self.mean, self.std)
        return Preprocessing(
            size=cast("tuple[int, int]", tuple(self.size or default.size)),
            mean=tuple(self.mean or default.mean),
            std=tuple(self.std or default.std),
            interpolation=default.interpolation,
            crop=default.crop,
            resize=default.resize,
        )

    def check(self, domains: Sequence[str]) -> None:
        """Check that the images of these domains can be read; each is opened once in a run.

        Raises:
            MergeError: If images cannot be read; they are named.
        """
        todo = [domain for domain in dict.fromkeys(domains) if domain not in self._checked]
        if not self.check_images or not todo:
            return
        files = [file for domain in todo for files in self._files[domain].values() for file in files]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            raise_all([problem for found in pool.map(partial(problems_of, _check_image), files) for problem in found])
        self._checked.update(todo)

    def description(self) -> dict[str, Any]:
        """Describe, in plain values, what the results depend on."""
        counts = {
            domain: {name: len(files) for name, files in classes.items()} for domain, classes in self._files.items()
        }
        return (
            super().description()
            | {"images": counts, "crop_scale": self.crop_scale, "flip": self.flip}
            | {
                "size": self.size,
                "mean": self.mean,
                "std": self.std,
            }
        )


def find_images(root: Path, classes: Sequence[str] | None = None) -> dict[str, dict[str, list[Path]]]:
    """Find ``root/domain/class/image``: for every domain and class the sorted images.

    Raises:
        MergeError: If folders are missing or empty, or if the domains do not have the same classes.
    """
    if not root.is_dir():
        raise MergeError(
            f"There is no folder {root}; it should hold a folder for each domain (root/domain/class/image)."
        )
    tree = {domain.name: {kind.name: kind for kind in _folders(domain)} for domain in _folders(root)}
    if not tree:
        raise MergeError(f"{root} holds no folders; it should hold one for each domain (root/domain/class/image).")
    names = sorted(classes) if classes is not None else sorted({name for kinds in tree.values() for name in kinds})
    if not names:
        raise MergeError(f"The domains in {root} hold no class folders (root/domain/class/image).")
    problems: list[str] = []
    images: dict[str, dict[str, list[Path]]] = {}
    for domain, kinds in tree.items():
        images[domain] = {}
        for name in names:
            files = _images(kinds[name]) if name in kinds else []
            if not files:
                what = "holds no images" if name in kinds else "does not exist"
                problems.append(
                    f"The class folder {root / domain / name} {what}; all domains need the same classes: add images, "
                    "move the domain away, or choose the classes with data.classes."
                )
            images[domain][name] = files
    raise_all(problems)
    return images


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    files = (Path(where, file) for where, _, names in os.walk(folder) for file in names if not file.startswith("."))
    return sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)


def _check_image(file: Path) -> None:
    """Raise a :class:`MergeError` if an image file cannot be read.

    Of a JPEG or PNG only the header is decoded and the end mark looked for: that finds files cut short at the price
    of two small reads. Other formats, and files without their end mark, are decoded in full.
    """
    with _opened(file) as image:
        end = _END_MARK.get(image.format or "")
        if end is None or not _ends_with(file, end):
            image.load()


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """Open an image file, whose pixels are read within the block.

    Raises:
        MergeError: If it cannot be read, or if its pixels would need too much memory.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            if math.prod(image.size) > _MOST_PIXELS:
                raise ValueError(f"it has {math.prod(image.size):,} pixels, more than {_MOST_PIXELS:,}")
            yield image
    except Exception as error:  # a decoder raises anything at damaged files
        raise MergeError(f"The image {file} cannot be read ({error}); mend it or remove it.") from error


_MOST_PIXELS = 64_000_000
"""The most pixels of an image, which a file of a few kB can have."""
_END_MARK = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


def _ends_with(file: Path, mark: bytes) -> bool:
    with file.open("rb") as content:
        content.seek(-min(64, os.path.getsize(file)), os.SEEK_END)
        return mark in content.read()


@dataclass
class ImageFiles(Dataset):
    """Images that are read from files when they are asked for.

    Args:
        files: The files.
        labels: Their labels ``(N,)``.
        transform: From an RGB image to a tensor ``(3, H, W)``.
    """

    files: Sequence[Path]
    labels: np.ndarray
    transform: Any

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with _opened(self.files[index]) as file:
            image = file.convert("RGB")
        return self.transform(image), int(self.labels[index])
