"""Folders of images as people have them on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lightning_merge as lm
from lightning_merge.data.domain_folders import find_images
from lightning_merge.data.transforms import eval_transform, train_transform
from lightning_merge.models.backbones import Preprocessing
from tests.toys import image_folders

SHAPE = {"size": (16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return image_folders(tmp_path / "data")


def refusal(root: Path, **arguments) -> str:
    with pytest.raises(lm.MergeError) as caught:
        lm.DomainFolders(str(root), **SHAPE, **arguments).setup("fit")
    return str(caught.value)


def test_domains_and_classes_are_the_folders(root):
    data = lm.DomainFolders(str(root))
    assert data.domains == ["cartoon", "photo", "sketch"]
    assert data.class_names == ["cat", "dog"]
    assert data.labels("photo").tolist() == [0] * 10 + [1] * 10


def test_the_split_does_not_depend_on_other_domains_or_on_the_file_system(root, tmp_path):
    other = image_folders(tmp_path / "other", domains=["photo"])
    one, two = lm.DomainFolders(str(root)), lm.DomainFolders(str(other))
    assert one.split("photo", "test").tolist() == two.split("photo", "test").tolist()
    assert (
        one.split("photo", "test").tolist() != lm.DomainFolders(str(root), split_seed=1).split("photo", "test").tolist()
    )


def test_images_arrive_as_the_backbone_wants_them(root):
    data = lm.DomainFolders(str(root), train_domains=["photo"], batch_size=4, **SHAPE)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert labels.dtype == torch.int64


def test_the_preprocessing_is_the_model_s(root):
    model = lm.Expert(
        "timm/vit_tiny_patch16_224",
        num_classes=2,
        pretrained=False,
        backbone_args={"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2},
    )
    trainer = lm.MergeTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    data = lm.DomainFolders(str(root), test_domains=["photo"])
    trainer.test(model, datamodule=data, verbose=False)
    assert next(iter(data.test_dataloader()[0]))[0].shape[-2:] == (32, 32)
    assert data.preprocessing.mean == (0.5, 0.5, 0.5)


def test_eval_transform_by_hand():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 255  # the centre is white
    transform = eval_transform(Preprocessing((10, 10), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear"))
    image = transform(Image.fromarray(pixels))
    assert image.shape == (3, 10, 10)
    assert bool((image[:, :, 1:-1] == 2).all())  # (1 - 0.5) / 0.25


def test_train_transform_keeps_nearly_everything_and_flips():
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:, :10] = 255
    transform = train_transform(Preprocessing((20, 20), (0.0,) * 3, (1.0,) * 3), crop_scale=1.0, flip=True)
    torch.manual_seed(0)
    left = [bool(transform(Image.fromarray(pixels))[0, 10, 2] > 0.5) for _ in range(40)]
    assert 8 < sum(left) < 32


class TestRefusals:
    def test_missing_root(self, tmp_path):
        assert f"There is no folder {tmp_path / 'gone'}" in refusal(tmp_path / "gone")

    def test_empty_root(self, tmp_path):
        assert f"{tmp_path} holds no folders" in refusal(tmp_path)

    def test_empty_class(self, root):
        for image in (root / "photo" / "cat").iterdir():
            image.unlink()
        assert f"The class folder {root / 'photo' / 'cat'} holds no images" in refusal(root)

    def test_classes_that_differ(self, root):
        (root / "sketch" / "dog").rename(root / "sketch" / "wolf")
        message = refusal(root)
        assert f"{root / 'sketch' / 'dog'} does not exist" in message
        assert f"{root / 'photo' / 'wolf'} does not exist" in message
        assert "data.classes" in message
        assert lm.DomainFolders(str(root), classes=["cat"]).class_names == ["cat"]

    def test_a_class_too_small_to_split(self, root):
        for image in sorted((root / "photo" / "cat").iterdir())[2:]:
            image.unlink()
        with pytest.raises(lm.MergeError, match="'cat' of domain 'photo' has 2 images"):
            lm.DomainFolders(str(root)).split("photo", "train")

    @pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no image at all"])
    def test_unreadable_images_are_named_before_anything_runs(self, root, damage):
        broken = root / "photo" / "dog" / "03.jpg"
        broken.write_bytes(damage(broken.read_bytes()))
        message = refusal(root)
        assert f"The image {broken} cannot be read" in message
        assert "remove it" in message

    def test_an_image_broken_later_is_named_too(self, root):
        data = lm.DomainFolders(str(root), train_domains=["photo"], **SHAPE)
        data.setup("fit")
        broken = root / "photo" / "dog" / "03.jpg"
        broken.write_bytes(b"")
        with pytest.raises(lm.MergeError, match=r"03\.jpg cannot be read"):
            list(data._loader(["photo"], "all"))

    def test_domains_that_are_not_used_are_not_opened(self, root):
        (root / "photo" / "dog" / "03.jpg").write_bytes(b"")
        lm.DomainFolders(str(root), train_domains=["sketch"], **SHAPE).setup("fit")

    def test_a_model_without_preprocessing(self, root):
        with pytest.raises(lm.MergeError, match=r"data\.size, data\.mean and data\.std"):
            _ = lm.DomainFolders(str(root)).preprocessing


def test_trailing_bytes_and_other_files_do_no_harm(root):
    image = root / "photo" / "dog" / "03.jpg"
    image.write_bytes(image.read_bytes() + b"trailer" * 100)
    (root / "photo" / "dog" / "notes.txt").write_text("x")
    (root / "photo" / "dog" / ".hidden.jpg").write_text("x")
    (root / "readme.txt").write_text("x")
    lm.DomainFolders(str(root), **SHAPE).setup("fit")
    assert len(find_images(root)["photo"]["dog"]) == 10


def test_an_image_of_too_many_pixels_is_a_sentence(tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        folder = tmp_path / "photo" / name
        folder.mkdir(parents=True)
        Image.new("1", (9000, 8000)).save(folder / "a.png")
    data = lm.DomainFolders(str(tmp_path), size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(lm.MergeError, match=r"2 problems:(.|\n)*it has 72,000,000 pixels, more than 64,000,000"):
        data.check(["photo"])
    with pytest.raises(lm.MergeError, match=r"cat.a\.png cannot be read"):
        data.dataset("photo", np.arange(2), augment=False)[0]
