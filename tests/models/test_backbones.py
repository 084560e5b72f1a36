"""Backbones, their weights and their preprocessing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lightning_merge as lm
from lightning_merge.data.transforms import eval_transform
from lightning_merge.models.backbones import Preprocessing, load_clip, split_name, timm_backbone
from tests.toys import TINY_CONVNEXT, register_tiny_clip

TINY_VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2}


def test_any_timm_name_with_any_keyword():
    model, features, preprocessing = timm_backbone("vit_tiny_patch16_224", False, img_size=32, **TINY_VIT)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, features) == (1, 16)
    assert preprocessing.size == (32, 32)
    assert preprocessing.mean == (0.5, 0.5, 0.5)


def test_a_timm_weight_file_is_loaded_and_resampled():
    import timm

    source = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=5, **TINY_VIT)
    save_file({k: v.half() for k, v in source.state_dict().items()}, "weights.safetensors")
    model, _, _ = timm_backbone("vit_tiny_patch16_224", "weights.safetensors", img_size=32, **TINY_VIT)
    loaded = model.state_dict()
    assert torch.equal(
        loaded["blocks.0.attn.qkv.weight"], source.state_dict()["blocks.0.attn.qkv.weight"].half().float()
    )
    assert loaded["pos_embed"].shape == (1, 5, 16)


def test_an_open_clip_image_tower_loses_its_text_tower():
    name = register_tiny_clip(Path())
    expert = lm.Expert(f"open_clip/{name}", num_classes=2, pretrained=False)
    assert expert(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    assert not any("token_embedding" in key for key in expert.state_dict())
    assert expert.preprocessing.size == (32, 32)
    assert expert.preprocessing.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_an_open_clip_weight_file_is_loaded():
    import open_clip

    name = register_tiny_clip(Path())
    clip = open_clip.create_model(name)
    torch.save(clip.state_dict(), "clip.pt")
    expert = lm.Expert(f"open_clip/{name}", num_classes=2, pretrained="clip.pt")
    assert torch.equal(expert.backbone.proj, clip.visual.proj)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: split_name("resnet50"), "names no library; write timm/MODEL or open_clip/MODEL"),
        (lambda: split_name("torchvision/resnet50"), "names no library"),
        (lambda: timm_backbone("no_such_model", False), "timm has no model 'no_such_model'"),
        (lambda: timm_backbone("resnet18", "gone.safetensors"), "no weight file gone.safetensors"),
        (lambda: lm.Expert("open_clip/ViT-B-32", num_classes=2), "which weights open_clip should load.*openai"),
        (lambda: lm.Expert("timm/resnet18", pretrained=False), "needs num_classes or class_names"),
        (lambda: lm.Expert("timm/resnet18", 3, ["a", "b"], pretrained=False), "class_names has 2"),
        (lambda: lm.Expert("timm/resnet18", 2, pretrained=False, head="zero_shot"), "no text tower"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(make, message):
    with pytest.raises(lm.MergeError, match=message):
        make()


def test_the_weights_of_another_model_are_refused_parameter_by_parameter():
    small = lm.Expert("timm/convnext_tiny", 2, pretrained=False, backbone_args=TINY_CONVNEXT)
    lm.save_weights("small.ckpt", small.state_dict())
    with pytest.raises(lm.MergeError, match=r"'head.weight' has shape \(2, 8\) in small.ckpt and \(3, 8\) here"):
        lm.Expert("timm/convnext_tiny", 3, pretrained=False, backbone_args=TINY_CONVNEXT, weights="small.ckpt")


def test_a_file_of_another_architecture_is_refused_and_not_ignored():
    import timm

    save_file(timm.create_model("resnet10t").state_dict(), "resnet.safetensors")
    with pytest.raises(lm.MergeError, match=r"resnet\.safetensors holds no weights for .* would stay random"):
        timm_backbone("vit_tiny_patch16_224", "resnet.safetensors", img_size=32, **TINY_VIT)


@pytest.mark.parametrize("name", ["vit_base_patch16_224.augreg_in21k", "resnet50.a1_in1k", "resnet18"])
def test_preprocessing_is_timm_s_own(name):
    import timm
    from PIL import Image

    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    image = Image.fromarray(torch.randint(0, 256, (300, 400, 3), dtype=torch.uint8).numpy())
    ours = Preprocessing(
        config["input_size"][1:], config["mean"], config["std"], config["interpolation"], config["crop_pct"]
    )
    theirs = timm.data.create_transform(**config, is_training=False)
    torch.testing.assert_close(eval_transform(ours)(image), theirs(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_preprocessing_is_open_clip_s_own(mode):
    import open_clip
    from PIL import Image

    image = Image.fromarray(torch.randint(0, 256, (90, 120, 3), dtype=torch.uint8).numpy())
    theirs = open_clip.image_transform(32, is_train=False, mean=(0.5,) * 3, std=(0.25,) * 3, resize_mode=mode)
    ours = eval_transform(Preprocessing((32, 32), (0.5,) * 3, (0.25,) * 3, resize=mode))
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-5)


def test_no_library_is_given_a_pickle_that_runs_code(tmp_path: Path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": {"w": Harm()}}, "harm.pth")
    for build in (
        lambda: timm_backbone("resnet10t", "harm.pth"),
        lambda: load_clip("ViT-B-32", "harm.pth"),
    ):
        with pytest.raises(lm.MergeError, match=r"harm\.pth cannot be loaded without running code") as raised:
            build()
        assert "weights_only" not in str(raised.value)
    assert not (tmp_path / "ran").exists()
