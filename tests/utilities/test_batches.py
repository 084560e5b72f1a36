"""Batches of images: what is read of them, in which order, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_merge.utilities.batches import data_problems, images_of, read_images, rereading_problems
from lightning_merge.utilities.errors import MergeError

IMAGES = torch.arange(24.0).reshape(6, 1, 2, 2)
LABELS = torch.arange(6)


def again_and_again():
    """Data of every kind that a second loop reads from the start."""
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
    return {"a list": [IMAGES[:4], IMAGES[4:]], "a tuple": (IMAGES,), "a loader": loader, "a tensor": IMAGES.split(4)}


@pytest.mark.parametrize("kind", again_and_again())
def test_what_a_second_loop_reads_again_is_no_problem(kind):
    batches = again_and_again()[kind]
    first, second = (torch.cat(list(read_images(batches, "a"))) for _ in range(2))
    assert torch.equal(first, IMAGES)
    assert torch.equal(second, first)
    assert rereading_problems(batches, "a") == []


@pytest.mark.parametrize(
    "batches", [iter([IMAGES]), (image for image in IMAGES), map(torch.neg, [IMAGES]), zip(IMAGES, LABELS, strict=True)]
)
def test_what_a_second_loop_finds_empty_is_named(batches):
    assert rereading_problems(batches, "expert art") == [
        "The data of expert art can be read only once; give a DataLoader or a list of batches."
    ]
    assert list(batches), "no batch was taken by the check"
    assert not list(batches), "so it is right: nothing is left"


def test_labels_are_left_out():
    assert images_of(IMAGES, "x") is IMAGES
    assert images_of((IMAGES, LABELS), "x") is IMAGES
    assert images_of([IMAGES], "x") is IMAGES


@pytest.mark.parametrize(
    ("batch", "kind"), [({"image": IMAGES}, "dict"), ((), "tuple"), ("images", "str"), ([[IMAGES]], "list")]
)
def test_a_batch_without_images_is_refused(batch, kind):
    with pytest.raises(MergeError, match=f"A batch of the scans holds a {kind}; it must be images or"):
        images_of(batch, "the scans")


def test_batches_are_read_one_at_a_time():
    def batches():
        yield IMAGES[:1]
        pytest.fail("the second batch was read before it was asked for")

    assert torch.equal(next(read_images(batches(), "a")), IMAGES[:1])


def test_no_batch_at_all_is_refused_when_that_is_seen():
    with pytest.raises(MergeError, match="The data of expert art hold no batch"):
        list(read_images([], "expert art"))


def test_every_problem_of_the_data_of_experts_is_listed():
    data = {"art": iter([IMAGES]), "photo": [IMAGES], "poto": [IMAGES]}
    assert data_problems(data, ["art", "photo", "sketch"], "repair") == [
        "There are no data of expert sketch; give repair(…, data={'sketch': loader}).",
        "There are data for 'poto', which is no expert; the experts are art, photo, sketch.",
        "The data of expert art can be read only once; give a DataLoader or a list of batches.",
    ]
    assert data_problems({"art": [IMAGES]}, ["art"], "repair") == []
