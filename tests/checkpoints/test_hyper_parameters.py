"""What a file says besides weights is data: it names no code, no place to load from and no less safety."""

from __future__ import annotations

import pytest
import torch

import lightning_merge as lm
from lightning_merge.checkpoints.hyper_parameters import (
    argument_problems,
    backbone_problem,
    names_code,
    same_value,
    unsafe_arguments,
    without_code,
)
from tests.toys import base_weights, expert_weights


@pytest.mark.parametrize(
    "backbone", ["timm/resnet18.a1_in1k", "open_clip/ViT-B-32", "python/lightning_merge.models.vgg.VGG"]
)
def test_backbones_that_a_file_may_name(backbone):
    assert backbone_problem(backbone) is None


@pytest.mark.parametrize(
    "backbone",
    [
        "python/torch.nn.Linear",
        "timm/hf-hub:somebody/model",
        "timm/local-dir:/tmp/model",
        "open_clip/hf-hub:somebody/model",
        "open_clip/../model",
        "torchvision/resnet18",
        "timm/",
        {"class_path": "os.system"},
        None,
    ],
)
def test_backbones_that_a_file_may_not_name(backbone):
    assert "--model.backbone" in backbone_problem(backbone)


@pytest.mark.parametrize(
    "arguments",
    [
        None,
        {},
        {"img_size": 96, "in_chans": 1, "drop_path_rate": 0.1},
        {"widths": [8, 16, [32]], "norm": "bn", "x": None},
    ],
)
def test_arguments_that_a_file_may_give(arguments):
    assert argument_problems(arguments) == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "a"},
        {"pretrained_cfg": "x"},
        {"pretrained_cfg_overlay": {"url": "https://example.org"}},
        {"body": {"_code": "pass"}},
        {"name": "/etc/passwd"},
        {"name": "https://example.org/a.pt"},
        {"name": "import os\n"},
        {"width": 10**9},
        {"width": float("inf")},
        {3: 4},
        ["img_size"],
    ],
)
def test_arguments_that_a_file_may_not_give(arguments):
    assert argument_problems(arguments)


def test_less_safety_is_found_at_any_depth():
    assert list(unsafe_arguments({"a": [{"trust_remote_code": True}]})) == ["trust_remote_code=True"]
    assert list(unsafe_arguments({"weights_only": False})) == ["weights_only=False"]
    assert list(unsafe_arguments({"load_weights_only": 0})) == ["load_weights_only=0"]
    assert not list(unsafe_arguments({"weights_only": None, "trust_remote_code": False, "a": {"weights_only": True}}))


@pytest.mark.parametrize(
    "value", ["python/my.Net", [{"class_path": "a.B"}], {"x": {"_target_": "a.b"}}, {"_class_path": "os.system"}]
)
def test_values_that_name_code(value):
    assert names_code(value)


@pytest.mark.parametrize("value", ["adam", 3, None, [1, "a.b"], {"lr": 0.1}, torch.ones(2)])
def test_values_that_name_none(value):
    assert not names_code(value)


def test_values_are_compared_whatever_they_are():
    assert same_value([1, "a"], [1, "a"])
    assert not same_value(1, True)
    assert not same_value(torch.ones(2), torch.ones(2))


def test_what_is_handed_on():
    kept = without_code(
        {
            "_class_path": "somebody.Model",
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
            "backbone": "python/somebody.Net",
            "backbone_args": {"width": 3},
            "pretrained": "https://example.org/weights.pt",
            "weights": "other.ckpt",
            "net": {"class_path": "somebody.Net"},
            "loader": {"trust_remote_code": True},
            "num_classes": 7,
            "learning_rate": 0.1,
        }
    )
    assert kept == {"pretrained": False, "num_classes": 7, "learning_rate": 0.1}


def test_what_the_user_says_too_is_handed_on():
    stated = {"backbone": "python/my.Net", "backbone_args": {"stem": {"class_path": "my.Stem"}}, "num_classes": 3}
    assert without_code(stated, stated) == stated
    assert without_code(stated, {**stated, "backbone": "python/my.Other"}) == {"num_classes": 3}


def test_own_models_are_handed_on():
    stated = {
        "_class_path": "lightning_merge.models.Expert",
        "backbone": "timm/resnet18",
        "pretrained": True,
        "backbone_args": {"in_chans": 1},
    }
    assert without_code(stated) == stated
    assert without_code({"backbone": "open_clip/ViT-B-32", "pretrained": "openai"})["pretrained"] == "openai"
    assert without_code({"backbone": "a-model-of-another-project", "path": "/data"}) == {
        "backbone": "a-model-of-another-project",
        "path": "/data",
    }


@pytest.mark.parametrize("output", ["merged.ckpt", None])
def test_a_merge_hands_no_code_on(output):
    base = base_weights()
    stated = {"backbone": "python/os.system", "backbone_args": {"command": "true"}, "num_classes": 3}
    lm.save_weights("expert.ckpt", expert_weights(base, 1), hyper_parameters=stated)
    merged = lm.merge(base, {"a": "expert.ckpt"}, lm.methods.WeightAverage(), output=output)
    path = output or merged.save("saved.ckpt")
    assert lm.open_weights(path).header["hyper_parameters"] == {"num_classes": 3}
