"""Tasks in one file each: what is read, how it is split, and what is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lightning_merge as lm
from tests.toys import quiet_trainer, tiny_expert


def arrays(classes: int = 10, coloured: bool = False, size: int = 8) -> dict[str, np.ndarray]:
    """The first ``classes`` digits of scikit-learn."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(n_class=classes, return_X_y=True)
    images = (images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8).repeat(size // 8, 1).repeat(size // 8, 2)
    if coloured:
        images = np.stack([images, 255 - images, images // 2], axis=-1)
    names = np.array([f"digit {i}" for i in range(classes)])
    return {
        "train_images": images[:300],
        "train_labels": labels[:300].astype(np.uint8),
        "test_images": images[300:350],
        "test_labels": labels[300:350].astype(np.uint8),
        "classes": names,
    }


@pytest.fixture
def root(tmp_path: Path) -> str:
    folder = tmp_path / "tasks"
    folder.mkdir()
    np.savez(folder / "grey.npz", **arrays())
    np.savez(folder / "few.npz", **arrays(classes=3, size=16))
    np.savez_compressed(folder / "coloured.npz", **arrays(coloured=True))
    return str(folder)


def test_images_are_those_of_the_file(root):
    data = lm.TaskArrays(root, image_size=8, channels=1)
    assert data.domains == ["coloured", "few", "grey"]
    image, label = data.dataset("grey", data.split("grey", "test"), augment=False)[3]
    expected = torch.tensor(arrays()["test_images"][3]).float()[None] / 127.5 - 1
    torch.testing.assert_close(image, expected)
    assert label == arrays()["test_labels"][3]


def test_sizes_and_colours_are_converted_as_pillow_does(root):
    coloured, few = arrays(coloured=True)["test_images"][0], arrays(classes=3, size=16)["test_images"][0]
    data = lm.TaskArrays(root, image_size=8, channels=1)

    def shown(data: lm.TaskArrays, task: str) -> np.ndarray:
        return (data.dataset(task, data.split(task, "test"), augment=False)[0][0].numpy() + 1) * 127.5

    grey = np.asarray(Image.fromarray(coloured).convert("L"), dtype=float)
    np.testing.assert_allclose(shown(data, "coloured")[0], grey, atol=1.01)
    small = np.asarray(Image.fromarray(few).resize((8, 8), Image.Resampling.BILINEAR), dtype=float)
    np.testing.assert_allclose(shown(data, "few")[0], small, atol=1.01)
    in_colour = lm.TaskArrays(root, image_size=8, channels=3)
    np.testing.assert_allclose(shown(in_colour, "coloured"), coloured.transpose(2, 0, 1), atol=1e-3)
    assert shown(in_colour, "grey").shape == (3, 8, 8)


def test_splits_are_stratified_disjoint_and_leave_the_test_images_alone(root):
    data = lm.TaskArrays(root, val_fraction=0.2)
    train, val, test = (data.split("grey", split) for split in ("train", "val", "test"))
    assert sorted([*train, *val]) == list(range(300))
    assert test.tolist() == list(range(300, 350))
    assert abs(np.bincount(data.labels("grey")[val]) - 0.2 * np.bincount(data.labels("grey")[:300])).max() < 1
    np.testing.assert_array_equal(data.labels("grey")[test], arrays()["test_labels"])


def test_a_draw_is_stratified_and_reproducible(root):
    data, again = (lm.TaskArrays(root, max_train=100, max_test=20, image_size=8) for _ in range(2))
    assert len(data.labels("grey")) == 120
    expected = np.bincount(arrays()["train_labels"]) / 3
    assert abs(np.bincount(data.labels("grey")[:100]) - expected).max() <= 1
    everything = np.arange(120)
    assert len(lm.TaskArrays(root, max_test=49).split("grey", "test")) == 49
    one, two = (d.dataset("grey", everything, augment=False).images for d in (data, again))
    assert torch.equal(one, two)
    other = lm.TaskArrays(root, max_train=100, max_test=20, image_size=8, split_seed=1)
    assert not torch.equal(one, other.dataset("grey", everything, augment=False).images)


def test_training_images_are_shifted_by_up_to_two_pixels_and_no_others_are(root):
    data = lm.TaskArrays(root, image_size=8, channels=1, train_domains=["grey"])
    indices = data.split("grey", "train")[:20]
    plain, shifted = (data.dataset("grey", indices, augment=augment) for augment in (False, True))
    seen = set()
    for i in range(20):
        padded = torch.nn.functional.pad(plain[i][0], (2, 2, 2, 2), mode="replicate")
        windows = {(y, x): padded[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)}
        image = shifted[i][0]
        found = {at for at, window in windows.items() if torch.equal(window, image)}
        assert found
        seen |= found
    assert len(seen) > 8
    for loader in (data.val_dataloader(), data.statistics_dataloader(), data.test_dataloader()[0]):
        assert torch.equal(next(iter(loader))[0], next(iter(loader))[0])


def test_images_are_flipped_if_that_is_asked_for(root):
    data = lm.TaskArrays(root, image_size=8, shift=0, flip=True)
    plain, flipped = (data.dataset("grey", np.arange(40), augment=augment) for augment in (False, True))
    kinds = []
    for i in range(40):
        image = flipped[i][0]
        kinds.append(torch.equal(image, plain[i][0]))
        assert kinds[-1] or torch.equal(image, plain[i][0].flip(-1))
    assert 8 < sum(kinds) < 32


def test_normalisation_is_what_is_set_or_the_model_s_or_half(root):
    def first(data: lm.TaskArrays) -> torch.Tensor:
        return data.dataset("grey", np.arange(1), augment=False)[0][0]

    raw = torch.tensor(arrays()["train_images"][:1]).float() / 255
    data = lm.TaskArrays(root, image_size=8, channels=1)
    torch.testing.assert_close(first(data), (raw - 0.5) / 0.5)
    data.model = tiny_expert()
    mean, std = np.mean(data.model.preprocessing.mean), np.mean(data.model.preprocessing.std)
    assert mean != 0.5
    torch.testing.assert_close(first(data), (raw - mean) / std)
    torch.testing.assert_close(
        first(lm.TaskArrays(root, image_size=8, channels=1, mean=(0.1,), std=(0.3,))), (raw - 0.1) / 0.3
    )


class TestClasses:
    def test_are_those_of_the_one_task_in_use(self, root):
        data = lm.TaskArrays(root)
        assert data.only(["few"], ["few"]).class_names == ["digit 0", "digit 1", "digit 2"]
        assert lm.TaskArrays(root, test_domains=["few"]).class_names == data.class_names_of("few")
        assert len(lm.TaskArrays(root, train_domains=["grey", "coloured"]).class_names) == 10  # the same in both

    def test_of_several_kinds_are_refused(self, root):
        with pytest.raises(lm.MergeError, match=r"'few' and 'grey' have different classes .* one task at a time"):
            _ = lm.TaskArrays(root, train_domains=["few", "grey"]).class_names

    def test_one_expert_learns_one_task(self, root):
        data = lm.TaskArrays(root, image_size=8, channels=1, train_domains=["few"], batch_size=64)
        trainer = quiet_trainer(max_epochs=1)
        model = tiny_expert(num_classes=3, warmup_steps=1)
        trainer.fit(model, datamodule=data)
        assert 0 < trainer.test(model, datamodule=data, verbose=False)[0]["test/few/accuracy"] <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": None}, "lacks the array 'train_labels'"),
        ({"test_labels": np.full(50, 10, np.uint8)}, "test_labels of .* hold 10, but it names 10 classes"),
        ({"train_labels": np.zeros(7, np.uint8)}, "should be 300 integers"),
        ({"train_labels": np.zeros(300)}, "are float64 of shape"),
        ({"train_images": np.zeros((300, 8, 8))}, "should be uint8"),
        ({"train_images": np.zeros((300, 8, 8, 2), np.uint8)}, "1 or 3 channels"),
        (
            {"test_images": np.zeros((0, 8, 8), np.uint8), "test_labels": np.zeros(0, np.uint8)},
            "test split .* is empty",
        ),
        ({"train_labels": np.r_[1, [0] * 299].astype(np.uint8)}, "'broken' has 300 training images, too few"),
    ],
)
def test_what_a_file_lacks_is_said_before_the_fit(tmp_path, change, message):
    held = {name: array for name, array in (arrays() | change).items() if array is not None}
    np.savez(tmp_path / "broken.npz", **held)
    with pytest.raises(lm.MergeError, match=message):
        lm.TaskArrays(str(tmp_path)).setup("fit")


def test_files_that_are_no_archives(tmp_path):
    np.savez(tmp_path / "cut.npz", **arrays())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:2000])
    (tmp_path / "text.npz").write_text("no archive")
    np.savez_compressed(tmp_path / "flipped.npz", **arrays())
    content = bytearray((tmp_path / "flipped.npz").read_bytes())
    content[300:340] = bytes(40)
    (tmp_path / "flipped.npz").write_bytes(content)
    np.savez(tmp_path / "objects.npz", **(arrays() | {"classes": np.array([{}, {}], dtype=object)}))
    with pytest.raises(lm.MergeError) as raised:
        lm.TaskArrays(str(tmp_path)).setup("fit")
    assert [problem.split("(")[0].split("/")[-1] for problem in raised.value.problems] == [
        f"{name}.npz cannot be read " for name in ("cut", "flipped", "objects", "text")
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: lm.TaskArrays("nowhere").domains, "no folder nowhere"),
        (lambda root: lm.TaskArrays(".").domains, "holds no .npz files"),
        (lambda root: lm.TaskArrays(root, tasks=["blue"]).domains, "no task 'blue' .* coloured, few, grey"),
        (lambda root: lm.TaskArrays(root, train_domains=["blue"]).setup("fit"), "no domain 'blue'"),
        (lambda root: lm.TaskArrays(root, channels=2), "channels must be 1 .* or 3"),
        (lambda root: lm.TaskArrays(root, image_size=0), "image_size must be at least 1"),
        (lambda root: lm.TaskArrays(root, channels=1, mean=(0.5,) * 3), "mean has 3 values"),
        (lambda root: lm.TaskArrays(root, shift=-1), "shift must not be negative"),
        (lambda root: lm.TaskArrays(root, val_fraction=0.6), "between 0 and 0.5"),
        (lambda root: lm.TaskArrays(root, test_on="all"), "own file"),
        (lambda root: lm.TaskArrays(root).only(["few"], ["grey"], "all"), "own file"),
        (lambda root: lm.TaskArrays(root).split("few", "all"), "own file"),
        (lambda root: lm.TaskArrays(root, max_train=5).labels("grey"), "max_train=5 .* all 10 classes"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(root, make, message):
    with pytest.raises(lm.MergeError, match=message):
        make(root)


@pytest.mark.parametrize("flag", [1, 32])  # encrypted, patched: zipfile raises RuntimeErrors
def test_a_file_that_zipfile_does_not_read_is_named(root, flag):
    path = Path(root) / "grey.npz"
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= flag
    path.write_bytes(content)
    with pytest.raises(lm.MergeError, match=r"grey.npz cannot be read"):
        lm.TaskArrays(root).class_names_of("grey")


def test_arrays_far_larger_than_their_file_are_not_read(tmp_path):
    from lightning_merge.data.task_files import read_task

    parts = {f"{split}_labels": np.zeros(300_000, int) for split in ("train", "test")}
    images = {f"{split}_images": np.zeros((300_000, 24, 24), np.uint8) for split in ("train", "test")}
    path = tmp_path / "t.npz"
    np.savez_compressed(path, **parts, **images, classes=np.array(["a", "b"]))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(lm.MergeError, match=r"its arrays would have 35\d,\d{3},\d{3} bytes, more than 50 times"):
        read_task(path)


@pytest.mark.parametrize("content", [b"no array", b"\x93NUMPY\x01\x00\x10\x00{'descr': '''a\n  "])
def test_what_is_no_array_is_a_sentence(tmp_path, content):
    from lightning_merge.data.task_files import read_task

    path = tmp_path / "t.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("train_images", "train_labels", "test_images", "test_labels", "classes"):
            archive.writestr(name, content)
    with pytest.raises(lm.MergeError, match=r"t\.npz"):
        read_task(path)
