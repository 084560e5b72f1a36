"""Read batches of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_merge.utilities.errors import MergeError


def images_of(batch: Any, data: str) -> Tensor:
    """Take the images ``(N, …)`` out of a batch, which is the images or ``(images, labels)``.

    Args:
        batch: The batch.
        data: What the data are called in messages.

    Raises:
        MergeError: If it is something else.
    """
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        raise MergeError(
            f"A batch of {data} holds a {type(images).__name__}; it must be images or (images, labels), as tensors."
        )
    return images


def read_images(batches: Iterable[Any], task: str) -> Iterator[Tensor]:
    """Read images ``(N, …)`` batch by batch; of ``(images, labels)`` the labels are not read.

    Args:
        batches: Batches of images or ``(images, labels)``.
        task: What to call them in messages.

    Raises:
        MergeError: If a batch holds no images, or if there is none.
    """
    empty = True
    for batch in batches:
        empty = False
        yield images_of(batch, f"the data of {task}")
    if empty:
        raise MergeError(f"The data of {task} hold no batch; give at least one.")


def rereading_problems(batches: Iterable[Any], what: str) -> list[str]:
    """Check that batches can be read more than once, which an iterator cannot.

    Args:
        batches: The batches; none is read.
        what: What the data are of, in messages: ``expert art``, ``all tasks``.

    Returns:
        One sentence, or none.
    """
    if not isinstance(batches, Iterator):
        return []
    return [f"The data of {what} can be read only once; give a DataLoader or a list of batches."]


TaskBatches = Mapping[str, Iterable[Any]]
"""By expert, batches that can be read again and again: images, or ``(images, labels)``, whose labels are not read."""


def data_problems(data: TaskBatches, experts: Iterable[str], call: str) -> list[str]:
    """Check that there are data of every expert, of nobody else, and that they can be read more than once.

    Args:
        data: The batches of every expert; none is read.
        experts: The names of the experts.
        call: The function that takes ``data``, as messages call it.

    Returns:
        What is wrong, a sentence each.
    """
    return [
        *(
            f"There are no data of expert {name}; give {call}(…, data={{{name!r}: loader}})."
            for name in experts
            if name not in data
        ),
        *(
            f"There are data for {name!r}, which is no expert; the experts are {', '.join(experts)}."
            for name in data
            if name not in experts
        ),
        *(problem for name, batches in data.items() for problem in rereading_problems(batches, f"expert {name}")),
    ]
