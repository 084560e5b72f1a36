"""Real handwritten digits that come with scikit-learn, in several looks: a benchmark that downloads nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_merge.data.domain_data import DomainDataModule

Look = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""Function from images ``(N, 8, 8)`` in [0, 1] to images of the same shape."""


def upright(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Give ink and page of images ``(N, 8, 8)`` any two shades that differ: bright on dark or dark on bright."""
    shades = rng.uniform(0, 1, (64 * len(images), 2))
    shades = shades[np.abs(shades[:, 0] - shades[:, 1]) > 0.25][: len(images)]
    ink, page = shades.T.reshape(2, -1, 1, 1)
    return page + (ink - page) * images


def rotated(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn images ``(N, 8, 8)`` clockwise or counter-clockwise by 15 to 40 degrees."""
    from scipy.ndimage import rotate

    angles = rng.uniform(15, 40, len(images)) * rng.choice([-1, 1], len(images))
    return np.stack([rotate(image, angle, reshape=False, order=1) for image, angle in zip(images, angles, strict=True)])


def inverted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Invert images ``(N, 8, 8)``: dark ink on a bright page."""
    return 1 - images


def noisy(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise to every pixel of images ``(N, 8, 8)``."""
    return images + rng.normal(0, 0.25, images.shape)


def thick(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Thicken the pen in images ``(N, 8, 8)``: every pixel takes the brightest of its neighbours."""
    from scipy.ndimage import grey_dilation

    return np.stack([grey_dilation(image, size=(2, 2)) for image in images])


def slanted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Slant images ``(N, 8, 8)`` to the left or to the right by 0.4 to 0.8 pixels a row."""
    from scipy.ndimage import affine_transform

    slants = rng.uniform(0.4, 0.8, len(images)) * rng.choice([-1, 1], len(images))

    def slant(image: np.ndarray, by: float) -> np.ndarray:
        return affine_transform(image, [[1, 0], [by, 1]], offset=[0, -3.5 * by], order=1)

    return np.stack([slant(image, by) for image, by in zip(images, slants, strict=True)])


LOOKS: dict[str, Look] = {look.__name__: look for look in (upright, rotated, inverted, noisy, thick, slanted)}


class Digits(DomainDataModule):
    """The 1,797 digits of scikit-learn, 8 × 8 pixels; every domain shows them all in another look.

    The split is by digit: an image that is for testing in one domain is for testing in all of them, so that no look of
    it is ever trained on.
    """

    @property
    def domains(self) -> list[str]:
        """The looks; ``upright`` is what the base is for."""
        return list(LOOKS)

    @property
    def class_names(self) -> list[str]:
        """The ten digits."""
        return [str(digit) for digit in range(10)]

    @cached_property
    def _digits(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return images.reshape(-1, 8, 8) / 16, labels

    def labels(self, domain: str) -> np.ndarray:
        """Return the digits' labels ``(N,)``, the same in every domain."""
        return self._digits[1]

    def dataset(self, domain: str, indices: np.ndarray, augment: bool) -> Dataset:
        """Return the digits at ``indices`` in the domain's look, ``(1, 8, 8)``, scaled to [-1, 1]."""
        images, labels = self._digits
        shown = LOOKS[domain](images, np.random.default_rng(self.domains.index(domain)))[indices]
        return TensorDataset(
            torch.tensor(shown * 2 - 1, dtype=torch.float32).unsqueeze(1), torch.tensor(labels[indices])
        )
