"""Several tasks, each with images and classes of its own, in one file each: ``root/TASK.npz``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_merge.data.domain_data import DomainDataModule, Split
from lightning_merge.data.task_files import Part, ShiftedImages, Task, draw_by_class, read_task, resized
from lightning_merge.utilities.errors import MergeError, problems_of, raise_all

if TYPE_CHECKING:
    from typing_extensions import Self


class TaskArrays(DomainDataModule):
    """Images in a NumPy file for each task: MNIST, Fashion-MNIST, CIFAR-10, …, which do not share their classes.

    ``root/TASK.npz`` holds ``train_images`` and ``test_images``, uint8 ``(N, H, W)`` or ``(N, H, W, C)`` of any size;
    ``train_labels`` and ``test_labels``, integers; and ``classes``, their names. A task is what the other data modules
    call a domain. The test split is the file's own; the validation split is taken from its training images. In
    training, images are shifted at random, and flipped if that is asked for: digits and letters should not be.

    Args:
        root: The folder of the files.
        tasks: The tasks that there are; by default all files, sorted.
        train_domains: The tasks to train and validate on; by default those of ``test_domains``, else all.
        test_domains: The tasks to test on; by default those of ``train_domains``.
        test_on: Test on a task's ``test`` or ``val`` split.
        image_size: Height and width that images are resized to, in pixels.
        channels: 1 for grey images, 3 for coloured ones; those of the files are converted.
        val_fraction: Share of every class's training images that is for validation, below 0.5.
        max_train: Use at most this many of a task's training images, drawn by class; those for validation included.
        max_test: Use at most this many of its test images.
        mean: Mean per channel; by default that of the model's backbone, or 0.5.
        std: Standard deviation per channel; by default that of the model's backbone, or 0.5.
        shift: How far images are shifted in training at most, in pixels each way.
        flip: Flip half of the images in training.
        split_seed: Seed of the split and of the draw.
        batch_size: Images of a batch, over all processes.
        num_workers: Processes that prepare images.
    """

    def __init__(
        self,
        root: str,
        tasks: Sequence[str] | None = None,
        train_domains: Sequence[str] | None = None,
        test_domains: Sequence[str] | None = None,
        test_on: Literal["test", "val"] = "test",
        image_size: int = 32,
        channels: Literal[1, 3] = 3,
        val_fraction: float = 0.1,
        max_train: int | None = None,
        max_test: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        shift: int = 2,
        flip: bool = False,
        split_seed: int = 17,
        batch_size: int = 128,
        num_workers: int = 0,
    ) -> None:
        if not 0 < val_fraction < 0.5:
            raise MergeError(f"val_fraction must lie between 0 and 0.5, got {val_fraction}.")
        super().__init__(
            train_domains,
            test_domains,
            test_on=test_on,
            val_fraction=val_fraction,
            split_seed=split_seed,
            batch_size=batch_size,
            num_workers=num_workers,
        )
        self.root = Path(root).expanduser()
        self.tasks = tasks
        self.image_size, self.channels = image_size, channels
        self.max_train, self.max_test = max_train, max_test
        self.mean, self.std = mean, std
        self.shift, self.flip = shift, flip
        self._tasks: dict[str, Task] = {}  # shared by the copies that `only` makes
        self._check_arguments()

    def _check_arguments(self) -> None:
        counts = {"image_size": self.image_size, "max_train": self.max_train, "max_test": self.max_test}
        problems = [
            f"{name} must be at least 1, got {count}."
            for name, count in counts.items()
            if count is not None and count < 1
        ]
        if self.channels not in (1, 3):
            problems.append(f"channels must be 1 (grey) or 3 (coloured), got {self.channels}.")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.channels:
                problems.append(f"{name} has {len(values)} values and the images have channels={self.channels}.")
        if self.shift < 0:
            problems.append(f"shift must not be negative, got {self.shift}.")
        raise_all(problems)
        self._refuse_all(self.test_on)

    @staticmethod
    def _refuse_all(split: str) -> None:
        if split == "all":
            raise MergeError(
                "A task is tested on the test split of its own file, since an expert was trained on the rest; use "
                "test_on=test."
            )

    @property
    def domains(self) -> list[str]:
        """The names of the tasks."""
        if not self.root.is_dir():
            raise MergeError(f"There is no folder {self.root}; data.root should hold a file TASK.npz for each task.")
        stems = sorted(file.stem for file in self.root.glob("*.npz"))
        if not stems:
            raise MergeError(f"{self.root} holds no .npz files; data.root should hold a file TASK.npz for each task.")
        missing = [task for task in self.tasks or () if task not in stems]
        raise_all([f"There is no task {task!r} in {self.root}; there are {', '.join(stems)}." for task in missing])
        return stems if self.tasks is None else list(self.tasks)

    @property
    def train_domains(self) -> list[str]:
        """The tasks to train on."""
        tasks = self._train_domains if self._train_domains is not None else self._test_domains
        return list(tasks if tasks is not None else self.domains)

    @property
    def test_domains(self) -> list[str]:
        """The tasks to test on."""
        return list(self._test_domains) if self._test_domains is not None else self.train_domains

    def only(self, train: Sequence[str], test: Sequence[str], test_on: Literal["test", "all", "val"] = "test") -> Self:
        """Copy this data module for other tasks."""
        self._refuse_all(test_on)
        return super().only(train, test, test_on)

    @property
    def class_names(self) -> list[str]:
        """The classes of the tasks in use, which must be the same for all of them.

        Raises:
            MergeError: If they are not.
        """
        used = dict.fromkeys([*self.train_domains, *self.test_domains])
        names = {task: self.class_names_of(task) for task in used}
        if not names:
            return []
        first = next(iter(names))
        other = next((task for task in names if names[task] != names[first]), None)
        if other is not None:
            raise MergeError(
                f"The tasks {first!r} and {other!r} have different classes ({', '.join(names[first][:3])}… and "
                f"{', '.join(names[other][:3])}…), which one head cannot tell apart; use one task at a time: set "
                "data.train_domains and data.test_domains to it."
            )
        return names[first]

    def class_names_of(self, domain: str) -> list[str]:
        """Return the names of a task's classes."""
        return self._task(domain).classes

    def _task(self, name: str) -> Task:
        if name not in self._tasks:
            task = read_task(self.root / f"{name}.npz")
            self._tasks[name] = Task(
                task.classes,
                self._drawn(name, task.train, self.max_train, "max_train"),
                self._drawn(name, task.test, self.max_test, "max_test"),
            )
        return self._tasks[name]

    def _drawn(self, task: str, part: Part, count: int | None, argument: str) -> Part:
        """Draw at most ``count`` images by class, and resize and convert them."""
        images, labels = part
        if count is not None and count < len(labels):
            classes = len(set(labels.tolist()))
            if count < classes:
                raise MergeError(
                    f"{argument}={count} images of the task {task!r} cannot hold all {classes} classes; raise it."
                )
            kept = draw_by_class(labels, count, self.split_seed)
            images, labels = images[kept], labels[kept]
        return resized(images, self.image_size, self.channels), labels

    def check(self, domains: Sequence[str]) -> None:
        """Check the files for missing arrays, labels outside the classes, empty splits and classes too small."""

        def check(task: str) -> None:
            self.split(task, "train")

        raise_all([problem for task in domains for problem in problems_of(check, task)])

    def labels(self, domain: str) -> np.ndarray:
        """Return the labels of a task's training images, then those of its test images ``(N,)``."""
        task = self._task(domain)
        return np.concatenate([task.train[1], task.test[1]])

    def split(self, domain: str, split: Split) -> np.ndarray:
        """Return the indices ``(n,)`` of a split of a task, in ascending order.

        Raises:
            MergeError: If a class is too small to be split, or if ``all`` is asked for.
        """
        from sklearn.model_selection import train_test_split

        self._refuse_all(split)
        task = self._task(domain)
        labels = task.train[1]
        if split == "test":
            return np.arange(len(labels), len(labels) + len(task.test[1]))
        try:
            train, val = train_test_split(
                np.arange(len(labels)), test_size=self.val_fraction, stratify=labels, random_state=self.split_seed
            )
        except ValueError as error:
            raise MergeError(
                f"The task {domain!r} has {len(labels)} training images, too few to have all {len(task.classes)} "
                "classes in training and validation split; raise max_train or val_fraction, or add images."
            ) from error
        return np.sort({"train": train, "val": val}[split])

    def dataset(self, domain: str, indices: np.ndarray, augment: bool) -> Dataset:
        """Return the images of a task at ``indices`` ``(n,)``: ``(channels, image_size, image_size)``, normalised."""
        task, mean, std = self._task(domain), *self._normalisation()
        picked = torch.as_tensor(indices)
        images = torch.cat([task.train[0], task.test[0]])[picked].float() / 255
        labels = torch.as_tensor(self.labels(domain)[indices])
        shift, flip = (self.shift, self.flip) if augment else (0, False)
        return ShiftedImages((images - mean) / std, labels, shift, flip)

    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation ``(C, 1, 1)``: what was set here, the backbone's, or 0.5."""
        module = self.model or (self.trainer.lightning_module if self.trainer is not None else None)
        preprocessing = getattr(module, "preprocessing", None)

        def choose(chosen: Sequence[float] | None, backbone: Sequence[float] | None) -> Tensor:
            values = torch.tensor(chosen or backbone or (0.5,))
            if len(values) != self.channels:
                values = values.mean().expand(self.channels)  # a backbone for coloured images, used on grey ones
            return values[:, None, None]

        mean, std = (getattr(preprocessing, name, None) for name in ("mean", "std"))
        return choose(self.mean, mean), choose(self.std, std)

    def description(self) -> dict[str, Any]:
        """Describe, in plain values, what the results depend on."""
        images = ("image_size", "channels", "max_train", "max_test", "mean", "std", "shift", "flip")
        used = list(dict.fromkeys([*self.train_domains, *self.test_domains]))
        return {
            "class": type(self).__name__,
            "domains": used,
            "classes": {task: self.class_names_of(task) for task in used},
            "batch_size": self.batch_size,
        } | {name: getattr(self, name) for name in (*images, "val_fraction", "split_seed")}
