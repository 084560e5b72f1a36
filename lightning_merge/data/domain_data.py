"""The LightningDataModule of several domains: splits, training domains, the domain that is held out."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from lightning_merge.data.batches import batch_loader
from lightning_merge.utilities.errors import MergeError

if TYPE_CHECKING:
    from typing_extensions import Self

Split = Literal["train", "val", "test", "all"]


class DomainDataModule(LightningDataModule, ABC):
    """Images of several domains that share their classes.

    Every domain is split once into train, validation and test, stratified by class. The split depends on the domain's
    own samples and on ``split_seed`` only. Subclasses say which domains and classes there are and read the samples.

    Args:
        train_domains: The domains to train and validate on; by default all but the held-out one.
        test_domains: The domains to test on; by default the held-out one, else the training domains.
        held_out: The domain that is left out of training.
        test_on: Test on a domain's ``test`` split, on ``all`` of it (for a domain that was not trained on), or on its
            ``val`` split (to choose hyper-parameters).
        test_fraction: Share of every class that is for testing.
        val_fraction: Share of every class that is for validation.
        split_seed: Seed of the split.
        batch_size: Images of a batch, over all processes.
        num_workers: Processes that read images.
    """

    model: LightningModule | None = None
    """The model that images are prepared for, where no trainer says it."""

    def __init__(
        self,
        train_domains: Sequence[str] | None = None,
        test_domains: Sequence[str] | None = None,
        held_out: str | None = None,
        test_on: Literal["test", "all", "val"] = "test",
        test_fraction: float = 0.2,
        val_fraction: float = 0.1,
        split_seed: int = 17,
        batch_size: int = 128,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not (test_fraction > 0 and val_fraction > 0 and test_fraction + val_fraction < 1):
            raise MergeError(
                f"test_fraction and val_fraction must be positive and leave something to train on, got {test_fraction} "
                f"and {val_fraction}."
            )
        if batch_size < 1:
            raise MergeError(f"batch_size must be at least 1, got {batch_size}.")
        self.held_out = held_out
        self.test_on = test_on
        self.test_fraction = test_fraction
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._train_domains = train_domains
        self._test_domains = test_domains

    @property
    @abstractmethod
    def domains(self) -> list[str]:
        """The names of all domains."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """The names of the classes, in the order of the labels."""

    def class_names_of(self, domain: str) -> list[str]:
        """Return the names of a domain's classes: the same for all, unless a subclass has tasks of several kinds."""
        return self.class_names

    @abstractmethod
    def labels(self, domain: str) -> np.ndarray:
        """Return the labels of a domain's samples ``(N,)``."""

    @abstractmethod
    def dataset(self, domain: str, indices: np.ndarray, augment: bool) -> Dataset:
        """Return the samples of a domain at ``indices`` ``(n,)``: pairs of an image ``(C, H, W)`` and a label."""

    def check(self, domains: Sequence[str]) -> None:
        """Raise a :class:`MergeError` if the samples of these domains cannot be used. By default they can."""

    @property
    def train_domains(self) -> list[str]:
        """The domains to train on."""
        if self._train_domains is not None:
            return list(self._train_domains)
        return [domain for domain in self.domains if domain != self.held_out]

    @property
    def test_domains(self) -> list[str]:
        """The domains to test on."""
        if self._test_domains is not None:
            return list(self._test_domains)
        return [self.held_out] if self.held_out else self.train_domains

    def only(self, train: Sequence[str], test: Sequence[str], test_on: Literal["test", "all", "val"] = "test") -> Self:
        """Copy this data module for other domains."""
        other = copy.copy(self)
        other.held_out, other.test_on = None, test_on
        other._train_domains, other._test_domains = list(train), list(test)
        return other

    def setup(self, stage: str) -> None:
        """Check the choice of domains and their samples, before anything runs."""
        used = self._used_domains(stage)
        unknown = [domain for domain in used if domain not in self.domains]
        if unknown:
            raise MergeError(f"There is no domain {unknown[0]!r}; the domains are {', '.join(self.domains)}.")
        if stage == "fit" and self.held_out in self.train_domains:
            raise MergeError(f"The domain {self.held_out!r} is held out and cannot be trained on; take it out of one.")
        if stage == "fit" and not self.train_domains:
            raise MergeError("There is no domain to train on; set train_domains.")
        self.check(used)

    def _used_domains(self, stage: str) -> list[str]:
        if stage in ("fit", "validate"):
            return [*self.train_domains, *([self.held_out] if self.held_out else [])]
        return self.test_domains

    def split(self, domain: str, split: Split) -> np.ndarray:
        """Return the indices ``(n,)`` of a split of a domain, in ascending order.

        Raises:
            MergeError: If a class is too small to be split.
        """
        from sklearn.model_selection import train_test_split

        labels = self.labels(domain)
        everything = np.arange(len(labels))
        if split == "all":
            return everything
        for label, count in Counter(labels.tolist()).items():
            if count < 3:
                raise MergeError(
                    f"The class {self.class_names[label]!r} of domain {domain!r} has {count} images, too few for a "
                    "training, a validation and a test split; add images or leave the class out."
                )
        share = {"random_state": self.split_seed}
        val_size = self.val_fraction / (1 - self.test_fraction)
        try:
            remaining, test = train_test_split(everything, test_size=self.test_fraction, stratify=labels, **share)
            train, val = train_test_split(remaining, test_size=val_size, stratify=labels[remaining], **share)
        except ValueError as error:
            raise MergeError(
                f"The domain {domain!r} has {len(labels)} images, too few to have all {len(self.class_names)} classes "
                "in training, validation and test split; raise test_fraction and val_fraction, or add images."
            ) from error
        return np.sort({"train": train, "val": val, "test": test}[split])

    def _loader(self, domains: Sequence[str], split: Split, shuffle: bool = False) -> DataLoader:
        parts = [self.dataset(domain, self.split(domain, split), augment=shuffle) for domain in domains]
        return batch_loader(ConcatDataset(parts), self.batch_size, shuffle, self.num_workers)

    def train_dataloader(self) -> DataLoader:
        """Build the loader of the train splits of the training domains."""
        return self._loader(self.train_domains, "train", shuffle=True)

    def statistics_dataloader(self) -> DataLoader:
        """Build the loader of the train splits without augmentation: every sample once, in one random order."""
        parts = [self.dataset(domain, self.split(domain, "train"), augment=False) for domain in self.train_domains]
        samples: ConcatDataset[Any] = ConcatDataset(parts)
        order = np.random.default_rng(self.split_seed).permutation(len(samples)).tolist()
        return batch_loader(Subset(samples, order), self.batch_size, shuffle=False, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """Build the loader of the validation splits of the training domains, together."""
        return self._loader(self.train_domains, "val")

    def test_dataloader(self) -> list[DataLoader]:
        """Build one loader for each test domain."""
        return [self._loader([domain], self.test_on) for domain in self.test_domains]

    def predict_dataloader(self) -> list[DataLoader]:
        """Build one loader for each test domain."""
        return self.test_dataloader()

    def training_images(
        self, domains: Sequence[str], model: LightningModule, batch_size: int = 16
    ) -> dict[str, DataLoader]:
        """Build a loader of each domain's train split without augmentation, in random order, for what runs the model.

        Every process gets the same batches.

        Args:
            domains: The domains.
            model: The model that the images are prepared for.
            batch_size: Images of a batch; 16 as in AdaMerging's paper.
        """
        self.check(domains)
        data = copy.copy(self)
        data.model = model
        parts = {domain: data.dataset(domain, data.split(domain, "train"), augment=False) for domain in domains}
        return {
            domain: batch_loader(part, batch_size, True, self.num_workers, shared=False)
            for domain, part in parts.items()
        }

    def description(self) -> dict[str, Any]:
        """Describe, in plain values, what the results depend on."""
        return {
            "class": type(self).__name__,
            "domains": self.domains,
            "classes": self.class_names,
            "test_fraction": self.test_fraction,
            "val_fraction": self.val_fraction,
            "split_seed": self.split_seed,
            "batch_size": self.batch_size,
        }
