"""The digits, and what every data module of domains promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lightning_merge as lm
from lightning_merge.data.digits import LOOKS, Digits


def test_they_are_the_real_digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    data = Digits()
    shown, label = data.dataset("inverted", np.arange(1797), augment=False)[5]
    torch.testing.assert_close(shown, 1 - 2 * torch.tensor(images[5].reshape(1, 8, 8) / 16, dtype=torch.float32))
    assert label == labels[5]


@pytest.mark.parametrize("domain", LOOKS)
def test_every_look_is_reproducible_and_readable(domain):
    data = Digits()
    one = data.dataset(domain, data.split(domain, "train"), augment=False)[:][0]
    two = Digits().dataset(domain, data.split(domain, "train"), augment=False)[:][0]
    assert torch.equal(one, two)
    assert bool(one.isfinite().all())
    assert one.shape == (len(two), 1, 8, 8)


def test_a_look_of_an_image_does_not_depend_on_the_split():
    data = Digits()
    everything = data.dataset("noisy", data.split("noisy", "all"), augment=False)[:][0]
    test = data.split("noisy", "test")
    assert torch.equal(data.dataset("noisy", test, augment=False)[:][0], everything[test])


def test_splits_are_stratified_disjoint_and_complete():
    data = Digits(test_fraction=0.2, val_fraction=0.1)
    parts = [data.split("noisy", split) for split in ("train", "val", "test")]
    assert sorted(np.concatenate(parts)) == list(range(1797))
    assert [round(len(part) / 1797, 2) for part in parts] == [0.7, 0.1, 0.2]
    for part in parts:
        assert min(np.bincount(data.labels("noisy")[part])) >= 0.08 * len(part)


def test_an_image_for_testing_is_for_testing_in_every_look():
    data = Digits()
    assert all(np.array_equal(data.split("upright", "test"), data.split(domain, "test")) for domain in LOOKS)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_loader_reads_its_own_split_and_no_other(split):
    data = Digits(train_domains=["noisy"], test_domains=["noisy"], batch_size=50)
    loader = getattr(data, f"{split}_dataloader")()
    images = torch.cat([images for images, _ in (loader[0] if split == "test" else loader)])
    everything = data.dataset("noisy", data.split("noisy", "all"), augment=False)[:][0]
    seen = {int(i) for image in images for i in (everything == image).flatten(1).all(dim=1).nonzero()}
    own = set(data.split("noisy", split).tolist())
    assert seen <= own
    assert len(own - seen) < 50  # training drops what does not fill its last batch


class TestChoiceOfDomains:
    def test_held_out(self):
        data = Digits(held_out="noisy")
        assert "noisy" not in data.train_domains
        assert data.test_domains == ["noisy"]

    def test_only_makes_a_copy(self):
        data = Digits(held_out="noisy")
        other = data.only(train=["thick"], test=["slanted"], test_on="all")
        assert (other.train_domains, other.test_domains, other.test_on) == (["thick"], ["slanted"], "all")
        assert data.test_domains == ["noisy"]

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (lambda: Digits(train_domains=["nosy"]), "no domain 'nosy'; the domains are upright, rotated"),
            (lambda: Digits(train_domains=["noisy"], held_out="noisy"), "'noisy' is held out and cannot be trained on"),
            (lambda: Digits(train_domains=[]), "no domain to train on"),
            (lambda: Digits(held_out="dusk"), "no domain 'dusk'"),
        ],
    )
    def test_what_cannot_work_is_said_before_the_fit(self, data, message):
        with pytest.raises(lm.MergeError, match=message):
            data().setup("fit")

    @pytest.mark.parametrize("fractions", [(0, 0.1), (0.5, 0.5), (0.9, 0.2), (0.2, 0)])
    def test_fractions(self, fractions):
        with pytest.raises(lm.MergeError, match="must be positive and leave something to train on"):
            Digits(test_fraction=fractions[0], val_fraction=fractions[1])

    def test_test_on_all(self):
        data = Digits(test_domains=["noisy"], test_on="all", batch_size=100)
        assert sum(len(labels) for _, labels in data.test_dataloader()[0]) == 1797
